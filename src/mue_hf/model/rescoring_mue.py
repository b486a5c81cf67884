"""`exit_rescore`: the final hypotheses of a beam search scored anew by the whole model, in one pass.

A search whose tokens exit at different depths compares scores of different depths. Its hypotheses are good, its choice
among them is not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMode, LogitsProcessor, PrefixConstrainedLogitsProcessor
from transformers.modeling_outputs import ModelOutput

from .criteria_mue import ExitPolicy

# Logits that are held at a time.
LOGITS = 2**25


def check_rescoring(mode: GenerationMode, config: GenerationConfig, streamer: Any) -> None:
    """Raises a ValueError unless a call of `generate` is a beam search that returns its output at the end."""
    remedy = "or drop `exit_rescore`."
    if streamer is not None:
        raise ValueError(
            "`exit_rescore=True` chooses among whole sequences, which `streamer` would have shown by then; drop the "
            f"streamer, {remedy}"
        )
    if mode in (GenerationMode.SAMPLE, GenerationMode.BEAM_SAMPLE):
        raise ValueError(
            "`exit_rescore=True` chooses the best hypotheses, which a sample is not, but `do_sample=True`; pass "
            f"`do_sample=False`, {remedy}"
        )
    if mode != GenerationMode.BEAM_SEARCH:
        raise ValueError(
            "`exit_rescore=True` needs the hypotheses of a beam search, but "
            f"`num_beams={config.num_beams}` makes this {mode.value.replace('_', ' ')}; pass more beams, {remedy}"
        )


class RescoringMixin:
    """The choice among the hypotheses of a beam search, for a model with an output head and `generate`."""

    def _rescored(
        self,
        output: ModelOutput,
        config: GenerationConfig,
        run: Any,
        search: Mapping[str, Any],
    ) -> tuple[ModelOutput, int]:
        """Of a search, the sequences that are best at full depth.

        A score is that of transformers' beam search: the sum of the log-probabilities of the new tokens, </s>
        included, divided by their number to the power of `length_penalty`. The log-probabilities go through the
        logits processors of the call, as in the search. What masks (a prefix constraint, `no_repeat_ngram_size`) thus
        changes nothing, since a hypothesis holds no masked token; what scales (`renormalize_logits`,
        `repetition_penalty`) does.

        Args:
            output (`ModelOutput`): of the search, with all hypotheses [rows = images x beams].
            config (`GenerationConfig`): how many of them are wanted, and how they are scored.
            run (`_ExitRun`): the state of the call.
            search (`Mapping`): the arguments of the search.

        Returns:
            `ModelOutput` with `config.num_return_sequences` of each image, their scores -inf where no hypothesis is
            left (a constraint that allows fewer than there are beams); and layer calls of the decoder, as rows x
            tokens.
        """
        sequences, lengths = output.sequences, (output.beam_indices >= 0).sum(1)
        prompt = run.schedule.prompt_length
        states, executed = self._full_depth_states(sequences, prompt, search)
        step_logits = self._step_logits(states, run.text_ids)
        totals = _log_probs(step_logits, sequences, lengths, prompt, search["logits_processor"], config.num_beams)
        scores = totals / lengths.clamp_min(1) ** config.length_penalty
        ended = _ended(sequences, lengths, prompt, search["stopping_criteria"])
        # a beam of an image that has too few continuations may go on after its end
        ended &= ~run.finished(sequences).gather(1, lengths.clamp_min(1).unsqueeze(1) - 1).squeeze(1)
        scores = scores.masked_fill(~ended | _repeated(sequences, config.num_beams), -torch.inf)
        best = _best(scores, config.num_beams, config.num_return_sequences)
        longest = int(lengths[best].max())
        output.sequences = sequences[best, : prompt + longest]
        output.beam_indices = output.beam_indices[best, :longest]
        if output.sequences_scores is not None:
            output.sequences_scores = scores[best]
        return output, executed

    def _full_depth_states(self, sequences: Tensor, prompt: int, search: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The states [rows, new tokens, d] that predict each new token of sequences [rows, prompt + new tokens], in
        one pass of the whole decoder; and its layer calls."""
        mask, cache = search.get("decoder_attention_mask"), search.get("cache")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - 1 - prompt)], dim=1)
        outputs = self.model(
            encoder_outputs=search["encoder_outputs"],
            # after the end of a sequence there may be -1
            decoder_input_ids=sequences[:, :-1].clamp_min(0),
            decoder_attention_mask=mask,
            cache=None if cache is None else cache.for_same_images(),
            use_cache=False,
            exit_policy=ExitPolicy(),
            output_exit_layers=True,
            output_attentions=False,
            output_hidden_states=False,
        )
        return outputs.last_hidden_state[:, prompt - 1 :], outputs.executed_layers["decoder"]

    def _step_logits(self, states: Tensor, ids: slice | None) -> Iterator[Tensor]:
        """Logits [rows, vocabulary] of one step after the other, of states [rows, steps, d]; the head runs on as many
        steps at once as there is room for."""
        steps = max(LOGITS // (states.shape[0] * self.config.vocab_size), 1)
        for some in states.split(steps, dim=1):
            yield from self._logits(some, ids).unbind(1)


def _log_probs(
    step_logits: Iterable[Tensor],
    sequences: Tensor,
    lengths: Tensor,
    prompt: int,
    processors: Iterable[LogitsProcessor],
    num_beams: int,
) -> Tensor:
    """The summed log-probabilities [rows] of the new tokens of sequences [rows, prompt + new tokens], `lengths` [rows]
    of them, from the logits [rows, vocabulary] of each step.

    All processors run. Those that only mask leave a token that they do not forbid as it is, but a search that finds
    too few continuations takes forbidden ones too; what there is to save is a twentieth of the pass.
    """
    totals = torch.zeros(len(sequences), device=sequences.device)
    for step, logits in enumerate(step_logits):
        prefixes, live = sequences[:, : prompt + step], step < lengths
        scores = logits.float().log_softmax(-1)
        for processor in processors:
            if isinstance(processor, PrefixConstrainedLogitsProcessor):
                # a constraint says nothing about sequences that have ended
                scores = _constrained(scores, prefixes, live, processor._prefix_allowed_tokens_fn, num_beams)
            else:
                scores = processor(prefixes, scores)
        chosen = scores.gather(1, sequences[:, prompt + step, None].clamp_min(0)).squeeze(1)
        totals = totals + torch.where(live, chosen, 0.0)
    return totals


def _best(scores: Tensor, num_beams: int, count: int) -> Tensor:
    """The `count` best rows of each image; those of one score stay in the order of the search."""
    order = scores.unflatten(0, (-1, num_beams)).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(len(order), device=order.device).unsqueeze(1) * num_beams
    return (first + order[:, :count]).flatten()


def _constrained(
    scores: Tensor, prefixes: Tensor, live: Tensor, allowed: Callable[[int, Tensor], list[int]], num_beams: int
) -> Tensor:
    """Scores [rows, vocabulary] of the live rows, -inf where `allowed` forbids the token; as in transformers, allowed
    tokens of a row that has no other are forced where they are -inf already."""
    mask = torch.full_like(scores, -torch.inf)
    for row in live.nonzero().flatten().tolist():
        mask[row, allowed(row // num_beams, prefixes[row])] = 0
    masked = scores + mask
    return torch.where(masked.amax(-1, keepdim=True).isneginf(), mask, masked)


def _ended(sequences: Tensor, lengths: Tensor, prompt: int, criteria: StoppingCriteriaList) -> Tensor:
    """Whether each of sequences [rows, prompt + new tokens] is one that the search ended after its length [rows]. With
    fewer continuations than beams, a search has places that hold nothing, or a sequence that never ended."""
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    for length in lengths[lengths > 0].unique().tolist():
        of = lengths == length
        ended[of] = criteria(sequences[of, : prompt + length], None).to(ended.device)
    return ended


def _repeated(sequences: Tensor, num_beams: int) -> Tensor:
    """Whether each of sequences [rows, length] is that of an earlier beam of its image, as one that never started is
    that of the first."""
    beams = sequences.unflatten(0, (-1, num_beams))
    same = (beams.unsqueeze(2) == beams.unsqueeze(1)).all(-1)
    return same.tril(-1).any(-1).flatten()


__all__ = ["RescoringMixin", "check_rescoring"]
