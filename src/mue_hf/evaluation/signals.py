"""What layers say at full depth, recorded once, and the depths that thresholds would have given: those of a real run
for the encoder, an estimate for the decoder, where tokens that exit early change what later tokens see."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.criteria_mue import Similarity, last_valid, similarity
from ..model.processing_mue import MuEProcessor
from ..model.scoring_mue import answer_trie


def stream_layers(config: PreTrainedConfig) -> dict[str, int]:
    """The layers of each stream of a model: "image" and "text", or "encoder" in the joint mode, and "decoder"."""
    encoder = ("image", "text") if config.modality_decomposition else ("encoder",)
    return {stream: config.layers_of(stream) for stream in (*encoder, "decoder")}


def branching_nodes(processor: MuEProcessor) -> dict[tuple[int, ...], list[int]]:
    """Where the answers of entailment branch in their trie: tokens so far -> those that may come next, or `</s>`."""
    ids = processor.encode_answers(list(processor.entailment_answers.values()))
    trie = answer_trie(ids, processor.tokenizer.eos_token_id)
    return {prefix: tokens for prefix, tokens in trie.items() if len(tokens) > 1}


def answer_tokens(processor: MuEProcessor) -> list[int]:
    """The tokens among which answers of entailment are decided."""
    return sorted({token for tokens in branching_nodes(processor).values() for token in tokens})


@dataclass(frozen=True)
class Signals:
    """
    Cosines of each layer's output with its input, on the CPU; NaN for layers that a row did not run.

    Args:
        encoder (`dict[str, Tensor]`): [samples, layers] of "image" and "text", or of "encoder" in the joint mode.
        decoder (`Tensor` [decisions, layers]): one decision per decoder row and call, beams included.
        agreeing (`BoolTensor` [decisions, layers]): whether a layer's best token is the last one's, or it did not run.
        steps, rows (`LongTensor` [decisions]): decoding step, from 0, and decoder row, counted over all samples.
        samples (`LongTensor` [decoder rows]): the sample of each decoder row.
    """

    encoder: dict[str, Tensor]
    decoder: Tensor
    agreeing: Tensor
    steps: Tensor
    rows: Tensor
    samples: Tensor


class SignalRecorder:
    """
    Records [`Signals`] of every run of a model inside its `with` block. What is to be replayed must run without exits.
    Each decoder call costs one output head per layer, so its seconds mean nothing.

    Args:
        model ([`MuEForConditionalGeneration`]): the model that will run.
        tokens (sequence of `int`, *optional*): all that may be a layer's best token, see [`answer_tokens`].
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int] | None = None) -> None:
        self.model = model
        self.tokens = None if tokens is None else torch.tensor(sorted(set(tokens)), device=model.device)
        *streams, _ = stream_layers(model.config)
        self.encoder: dict[str, list[Tensor]] = {name: [] for name in streams}
        # The other fields of the signals, part by part.
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.num_samples = self.num_rows = self.step = 0

    def __enter__(self) -> "SignalRecorder":
        self.handles = []
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        for module, record in ((encoder, self._record_encoder), (decoder, self._record_decoder)):
            self.handles.append(module.register_forward_pre_hook(ask_for_states, with_kwargs=True))
            self.handles.append(module.register_forward_hook(record, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def signals(self) -> Signals:
        """What has been recorded."""
        encoder, others = ({name: torch.cat(some) for name, some in of.items()} for of in (self.encoder, self.parts))
        # The decisions of one decoder row stand together, in the order of its tokens.
        order = others["rows"].argsort(stable=True)
        sorted_ = {name: others[name][order] for name in ("decoder", "agreeing", "steps", "rows")}
        return Signals(encoder=encoder, samples=others["samples"], **sorted_)

    def _record_encoder(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        mask, states = output.attention_mask, output.hidden_states
        depths = {"image": output.image_exit_layers, "text": output.text_exit_layers}
        if "encoder" in self.encoder:
            parts = {"encoder": slice(None)}
            if depths["image"] is not None:
                depths["encoder"] = torch.maximum(depths["image"], depths["text"])
        else:
            text = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            place = mask.shape[1] - (0 if text is None else text.shape[1])
            parts = {"image": slice(0, place), "text": slice(place, None)}
        for name, part in parts.items():
            absent = ~mask[:, part].any(dim=1)
            cosines = [
                similarity(previous[:, part], current[:, part], mask[:, part]).masked_fill(absent, torch.nan)
                for previous, current in zip(states, states[1:], strict=False)
            ]
            layers = self.model.config.layers_of(name)
            self.encoder[name].append(_until_exit(cosines[:layers], depths.get(name), layers, torch.nan))
        self.first_sample, self.num_samples = self.num_samples, self.num_samples + mask.shape[0]
        self.step = 0

    def _record_decoder(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        states, depths = output.hidden_states, output.decoder_exit_layers
        count, tokens = states[0].shape[:2]
        if self.step == 0:
            images = self.num_samples - self.first_sample
            self.first_row, self.num_rows = self.num_rows, self.num_rows + count
            self.parts["samples"].append(self.first_sample + torch.arange(count) // (count // images))
        running = depths > 0
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, -tokens:].bool()[running]
        states = [state[running] for state in states]
        cosines = [similarity(*pair, mask) for pair in zip(states, states[1:], strict=False)]
        best = [self._best(state, mask) for state in states[1:]]
        agreeing = [tokens == best[-1] for tokens in best]
        self.parts["decoder"].append(_until_exit(cosines, depths[running], len(module.layers), torch.nan))
        self.parts["agreeing"].append(_until_exit(agreeing, depths[running], len(module.layers), True))
        rows = self.first_row + running.cpu().nonzero().flatten()
        self.parts["rows"].append(rows)
        self.parts["steps"].append(torch.full_like(rows, self.step))
        self.step += 1

    def _best(self, states: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.model.lm_head(self.model.get_decoder().layer_norm(last_valid(states, mask)))
        return (logits if self.tokens is None else logits[:, self.tokens]).argmax(-1)


def _until_exit(values: list[Tensor], depths: Tensor | None, layers: int, rest: float | bool) -> Tensor:
    """Values [rows] of the layers that some row ran, as [rows, layers] on the CPU, with `rest` after a row's exit."""
    stacked = torch.stack(values + [values[-1]] * (layers - len(values)), dim=1).cpu()
    if depths is None:
        return stacked
    return stacked.masked_fill(torch.arange(layers) >= depths.cpu().unsqueeze(1), rest)


def ask_for_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of encoder and decoder, by which they return the states after every layer."""
    return args, kwargs | {"output_hidden_states": True}


def replay(cosines: Tensor, thresholds: Sequence[float | None], min_layers: int = 1) -> Tensor:
    """
    The depths [rows] at which rows exit.

    Args:
        cosines (`Tensor` [rows, layers]): NaN throughout for a row that does not run; its depth is 0.
        thresholds (sequence of `float` or None): one per layer; None never lets a row exit.
        min_layers (`int`): no row exits before this many layers.
    """
    closed = [x is None or layer + 1 < min_layers for layer, x in enumerate(thresholds)]
    exits = Similarity.passes(cosines, cosines.new_tensor([0.0 if x is None else x for x in thresholds]))
    exits &= ~torch.tensor(closed)
    # After the last layer all do.
    exits[:, -1] = True
    return (exits.int().argmax(dim=1) + 1).masked_fill(cosines.isnan().all(dim=1), 0)


def without_decay(cosines: Tensor, steps: Tensor, num_steps: int, beta: float, tau: float = 1.0) -> Tensor:
    """Values [decisions, layers] that are above a constant threshold exactly where `cosines` are above Theta(t) of it
    (MuE, section 3; see [`ExitOptions`]), for `beta` above 0."""
    decay = torch.exp(-tau * steps.to(cosines.dtype) / num_steps).unsqueeze(1)
    return (cosines - (1 - beta) * decay) / beta


__all__ = [
    "SignalRecorder",
    "Signals",
    "answer_tokens",
    "ask_for_states",
    "branching_nodes",
    "replay",
    "stream_layers",
    "without_decay",
]
