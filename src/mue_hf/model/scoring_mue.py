"""Closed answer sets: their trie, and the log-probabilities of candidates as OFA scores them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .agreement_mue import check_answers
from .criteria_mue import CRITERIA, ExitPolicy
from .early_exit_mue import ExitRecord
from .exit_options_mue import (
    CONFIG_NAMES,
    ExitOptions,
    check_names,
    check_no_search,
    exit_attributes,
    resolve_options,
)
from .layers_mue import known_true


@dataclass
class MuEScoreOutput(ExitRecord, ModelOutput):
    r"""Output of `score_answers(..., return_dict=True)`; see [`ExitRecord`] for exits.

    scores (`torch.FloatTensor` of shape `(batch_size, answers)`):
        Log-probabilities.
    """

    scores: torch.FloatTensor | None = None


def answer_trie(answers: Sequence[Sequence[int]], eos_token_id: int) -> dict[tuple[int, ...], list[int]]:
    """Maps every prefix of an answer to the tokens that may follow it, in ascending order; a whole answer may end.

    Args:
        answers (list of lists of `int`): token ids without special tokens.

    Raises:
        ValueError: if there is no answer, an empty one, or one twice.
    """
    paths = [tuple(int(token) for token in answer) for answer in answers]
    if not paths or not all(paths):
        raise ValueError(f"`answers` must hold at least one answer and no empty one, got {list(answers)!r}.")
    if len(set(paths)) < len(paths):
        raise ValueError(f"`answers` must differ from each other, got {list(answers)!r}; drop the repeated one.")
    trie: dict[tuple[int, ...], set[int]] = {}
    for path in paths:
        for i, token in enumerate((*path, eos_token_id)):
            trie.setdefault(path[:i], set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in trie.items()}


class BranchingRows(NamedTuple):
    """The branching nodes of a trie as decoder rows: `input_ids` and `attention_mask` [batch * nodes, length]
    (row r belongs to sample r // nodes), and `last` [batch * nodes], each row's last valid position."""

    input_ids: Tensor
    attention_mask: Tensor
    last: Tensor


def branching_rows(
    prefixes: Sequence[tuple[int, ...]], prompt: Tensor, prompt_mask: Tensor, pad_token_id: int
) -> BranchingRows:
    """Appends each prefix to each decoder prompt [batch, length] (padded on the left) and pads on the right."""
    batch, width = prompt.shape[0], max(len(prefix) for prefix in prefixes)
    ids = prompt.new_full((len(prefixes), width), pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, prefix in enumerate(prefixes):
        ids[i, : len(prefix)] = prompt.new_tensor(prefix)
        mask[i, : len(prefix)] = True
    lengths = mask.sum(1)
    input_ids = torch.cat([prompt.repeat_interleave(len(prefixes), 0), ids.repeat(batch, 1)], dim=1)
    attention_mask = torch.cat([prompt_mask.bool().repeat_interleave(len(prefixes), 0), mask.repeat(batch, 1)], dim=1)
    return BranchingRows(input_ids, attention_mask, prompt.shape[1] - 1 + lengths.repeat(batch))


def answer_scores(
    answers: Sequence[Sequence[int]], trie: dict[tuple[int, ...], list[int]], log_probs: dict[tuple, Tensor], eos: int
) -> list[Tensor | float]:
    """Sums log-probabilities over each answer's tokens and its end; a step with one allowed token adds nothing.

    Args:
        log_probs (dict prefix -> `Tensor` [batch, allowed tokens]): at the branching nodes.
    """
    scores: list[Tensor | float] = []
    for answer in answers:
        path = tuple(int(token) for token in answer)
        total: Tensor | float = 0.0
        for i, token in enumerate((*path, eos)):
            if path[:i] in log_probs:
                total = total + log_probs[path[:i]][:, trie[path[:i]].index(token)]
        scores.append(total)
    return scores


def _check_answer_ids(answers: Any, vocab_size: int) -> None:
    try:
        valid = all(0 <= index(token) < vocab_size for answer in answers for token in answer)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"`answers` must be lists of token ids in [0, {vocab_size}), got {list(answers)!r}; "
            "make them with `processor.encode_answers`."
        )


class AnswerScoringMixin:
    """`score_answers` of a model with a tied output head and exit options."""

    @torch.no_grad()
    def score_answers(
        self,
        answers: Sequence[Sequence[int]],
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
        **inputs: Any,
    ) -> Tensor | MuEScoreOutput:
        """Log-probabilities of a closed set of answers, as OFA scores visual entailment.

        Each answer is teacher-forced after the decoder prompt; at each of its tokens, and at its end, the softmax runs
        over the tokens that some answer allows there. Only the output rows of those tokens are computed, also for
        exit criteria that look at the output. Exit options apply as in `generate`: those saved with the model, those
        passed here first.

        Args:
            answers (list of lists of `int`): token ids, from `processor.encode_answers([...])`.
            decoder_input_ids (`LongTensor` [batch, length], *optional*): the decoder prompt, padded on the left.
                Default: the start token.
            decoder_attention_mask (`Tensor` [batch, length], *optional*): 0 on padding.
            return_dict (`bool`): whether to return a [`MuEScoreOutput`] with exit depths.
            inputs: what `forward` takes (`pixel_values`, `input_ids`, ...) and exit options by name.

        Returns:
            `Tensor` [batch, answers], or [`MuEScoreOutput`].

        Raises:
            ValueError: for empty or repeated answers, and whatever `forward` and the exit options refuse.
        """
        options = self._scoring_options(inputs)
        eos = self.generation_config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        if eos is None:
            raise ValueError("`generation_config.eos_token_id` must end an answer, got None; set it.")
        _check_answer_ids(answers, self.config.vocab_size)
        check_answers(options.exit_fit, answers)
        trie = answer_trie(answers, eos)
        encoder_outputs = inputs.pop("encoder_outputs", None)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(**inputs, exit_options=options, output_exit_layers=True)
        batch, device = encoder_outputs.last_hidden_state.shape[0], encoder_outputs.last_hidden_state.device
        if decoder_input_ids is None:
            decoder_input_ids = torch.full((batch, 1), self.config.decoder_start_token_id, device=device)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        if not bool(decoder_attention_mask[:, -1].all()):
            raise ValueError("`decoder_input_ids` must be padded on the left, but `decoder_attention_mask` ends in 0.")
        # a single answer: nothing to decide, but depths and errors are those of running it
        nodes = [prefix for prefix, tokens in trie.items() if len(tokens) > 1] or [()]
        rows = branching_rows(nodes, decoder_input_ids, decoder_attention_mask, self.config.pad_token_id)
        policy = replace(options.policy("decoder", self.config.decoder_layers), warmup=0.0)
        # all answers are decided at step 0
        policy = policy.at_step(0, 1 + max(len(answer) for answer in answers))
        policy, predict = self._looking_at(policy, trie, nodes, batch)
        outputs = self.model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=rows.input_ids,
            decoder_attention_mask=None if known_true(rows.attention_mask) else rows.attention_mask,
            exit_policy=policy,
            predict=predict,
            use_cache=False,
            output_exit_layers=True,
        )
        states = outputs.last_hidden_state[torch.arange(len(rows.last), device=device), rows.last]
        states = states.unflatten(0, (batch, len(nodes)))
        log_probs = {
            node: self._logits(states[:, i], torch.tensor(trie[node], device=device))[:, trie[node]].log_softmax(-1)
            for i, node in enumerate(nodes)
        }
        scores = torch.stack(answer_scores(answers, trie, log_probs, eos), dim=1)
        if not return_dict:
            return scores
        record = outputs.exit_record()
        record["decoder_exit_layers"] = outputs.decoder_exit_layers.unflatten(0, (batch, len(nodes)))
        return MuEScoreOutput(scores=scores, **record)

    def _looking_at(
        self, policy: ExitPolicy, trie: dict[tuple[int, ...], list[int]], nodes: list[tuple[int, ...]], batch: int
    ) -> tuple[ExitPolicy, Callable[[Tensor], Tensor]]:
        """The policy of the rows of `nodes`, and the head that its criterion looks at: of the tokens allowed there."""
        tokens = sorted({token for node in nodes for token in trie[node]})
        # of a single answer there is nothing to decide
        if not CRITERIA[policy.criterion].needs_logits or len(tokens) < 2:
            return policy, self._exit_head(None)
        if len(nodes) > 1:
            device = self.get_input_embeddings().weight.device
            allowed = torch.tensor([[token in trie[node] for token in tokens] for node in nodes], device=device)
            step = torch.tensor([len(node) for node in nodes])
            policy = replace(policy, step=step.repeat(batch), allowed=allowed.repeat(batch, 1))
        return policy, self._exit_head(tokens)

    def _scoring_options(self, inputs: dict[str, Any]) -> ExitOptions:
        """Takes the exit options out of the keyword arguments, and resolves them with those that are saved."""
        call = {name: inputs.pop(name) for name in list(inputs) if name in CONFIG_NAMES}
        check_names(inputs, CONFIG_NAMES)
        check_no_search(call, "score_answers")
        saved = exit_attributes(self.generation_config)
        options = resolve_options(call, {}, saved, self.config)
        if options.active:
            self._check_chosen_preset(None, call, {}, saved)
        return options


__all__ = [
    "AnswerScoringMixin",
    "BranchingRows",
    "MuEScoreOutput",
    "answer_scores",
    "answer_trie",
    "branching_rows",
]
