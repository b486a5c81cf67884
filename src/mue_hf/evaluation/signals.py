"""What layers say at full depth, recorded once, and what a criterion would have made of it; thresholds to try.

Replayed depths are those of a real run for the encoder. For the decoder they are an estimate: tokens that leave early
change what later tokens see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.criteria_mue import last_valid, similarity
from ..model.decoder_mue import MuEDecoder
from ..model.encoder_mue import MuEEncoder

# Every cosine is above it.
ALWAYS = -1.01
# How finely thresholds are tried before a few of them are kept.
GRID = 64


@dataclass(frozen=True)
class Signals:
    """
    Cosines of each layer's output with its input; on the CPU. Layers that a row did not run are NaN.

    Args:
        encoder (`dict[str, Tensor]`): "image" and "text", or "encoder" in the joint mode: [samples, layers], NaN where
            a sample lacks the stream.
        decoder (`Tensor` [decisions, layers]): one decision per decoder row and call, beams included.
        agreeing (`BoolTensor` [decisions, layers]): whether a layer's best token is that of the last layer; True of
            layers that were not run.
        steps (`LongTensor` [decisions]): the decoding step of each decision, from 0.
        rows (`LongTensor` [decisions]): its decoder row, counted over all samples.
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
    Records [`Signals`] of every run of the model inside its `with` block. What is to be replayed must not leave early.

    Each decoder call costs one output head per layer, so its seconds mean nothing.

    Args:
        model ([`MuEForConditionalGeneration`]): the model that will run.
        tokens (sequence of `int`, *optional*): the only ones that count as a layer's best token, those of a closed set
            of answers.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int] | None = None) -> None:
        self.model = model
        self.tokens = None if tokens is None else torch.tensor(sorted(set(tokens)), device=model.device)
        streams = ("image", "text") if model.config.modality_decomposition else ("encoder",)
        self.encoder: dict[str, list[Tensor]] = {name: [] for name in streams}
        self.decoder: list[Tensor] = []
        self.agreeing: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.num_samples = self.num_rows = self.step = 0

    def __enter__(self) -> "SignalRecorder":
        self.handles = []
        for module, record in (
            (self.model.get_encoder(), self._record_encoder),
            (self.model.get_decoder(), self._record_decoder),
        ):
            self.handles.append(module.register_forward_pre_hook(_ask_for_states, with_kwargs=True))
            self.handles.append(module.register_forward_hook(record, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def signals(self) -> Signals:
        """What has been recorded."""
        rows = torch.cat(self.rows)
        # The decisions of one decoder row stand together, in the order of its tokens.
        order = rows.argsort(stable=True)
        return Signals(
            {name: torch.cat(parts) for name, parts in self.encoder.items()},
            torch.cat(self.decoder)[order],
            torch.cat(self.agreeing)[order],
            torch.cat(self.steps)[order],
            rows[order],
            torch.cat(self.samples),
        )

    def _record_encoder(self, module: MuEEncoder, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        mask, states = output.attention_mask, output.hidden_states
        parts = {"encoder": slice(None)}
        if "encoder" not in self.encoder:
            text = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            place = mask.shape[1] - (0 if text is None else text.shape[1])
            parts = {"image": slice(0, place), "text": slice(place, None)}
        depths = {"image": output.image_exit_layers, "text": output.text_exit_layers}
        if "encoder" in parts and output.image_exit_layers is not None:
            depths["encoder"] = torch.maximum(output.image_exit_layers, output.text_exit_layers)
        for name, part in parts.items():
            absent = ~mask[:, part].any(dim=1)
            cosines = [
                similarity(previous[:, part], current[:, part], mask[:, part]).masked_fill(absent, torch.nan)
                for previous, current in zip(states, states[1:], strict=False)
            ]
            self.encoder[name].append(_until_exit(cosines, depths.get(name), len(module.layers), torch.nan))
        self.first_sample, self.num_samples = self.num_samples, self.num_samples + mask.shape[0]
        self.step = 0

    def _record_decoder(self, module: MuEDecoder, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        states = output.hidden_states
        count, tokens = states[0].shape[:2]
        if self.step == 0:
            images = self.num_samples - self.first_sample
            self.first_row, self.num_rows = self.num_rows, self.num_rows + count
            self.samples.append(self.first_sample + torch.arange(count) // (count // images))
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, -tokens:].bool()
        running = output.exit_layers > 0
        mask = None if mask is None else mask[running]
        states = [state[running] for state in states]
        cosines = [similarity(*pair, mask) for pair in zip(states, states[1:], strict=False)]
        best = [self._best(state, mask) for state in states[1:]]
        agreeing = [tokens == best[-1] for tokens in best]
        depths = output.exit_layers[running]
        self.decoder.append(_until_exit(cosines, depths, len(module.layers), torch.nan))
        self.agreeing.append(_until_exit(agreeing, depths, len(module.layers), True))
        rows = self.first_row + running.cpu().nonzero().flatten()
        self.rows.append(rows)
        self.steps.append(torch.full_like(rows, self.step))
        self.step += 1

    def _best(self, states: Tensor, mask: Tensor | None) -> Tensor:
        states = self.model.get_decoder().layer_norm(last_valid(states, mask))
        logits = self.model.lm_head(states)
        return (logits if self.tokens is None else logits[:, self.tokens]).argmax(-1)


def _until_exit(values: list[Tensor], depths: Tensor | None, layers: int, rest: float | bool) -> Tensor:
    """Values [rows] of the layers that some row ran, as [rows, layers] on the CPU, with `rest` after a row's exit."""
    stacked = torch.stack(values + [values[-1]] * (layers - len(values)), dim=1).cpu()
    if depths is None:
        return stacked
    return stacked.masked_fill(torch.arange(layers) >= depths.cpu().unsqueeze(1), rest)


def _ask_for_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | {"output_hidden_states": True}


def replay(cosines: Tensor, thresholds: Sequence[float | None], min_layers: int = 1) -> Tensor:
    """
    The depths [rows] at which rows with `cosines` [rows, layers] leave.

    Args:
        cosines (`Tensor` [rows, layers]): NaN throughout for a row that does not run; its depth is 0.
        thresholds (sequence of `float` or None): one per layer; None never lets a row leave.
        min_layers (`int`, *optional*, defaults to 1): no row leaves before this many layers.
    """
    limits = [torch.inf if x is None or layer + 1 < min_layers else x for layer, x in enumerate(thresholds)]
    leaves = cosines > cosines.new_tensor(limits)
    # After the last layer all do.
    leaves[:, -1] = True
    return (leaves.int().argmax(dim=1) + 1).masked_fill(cosines.isnan().all(dim=1), 0)


def without_decay(cosines: Tensor, steps: Tensor, num_steps: int, beta: float, tau: float = 1.0) -> Tensor:
    """Values [decisions, layers] that are above a constant threshold exactly where `cosines` are above Theta(t) of it
    (MuE, section 3; see [`ExitOptions`]), for `beta` above 0."""
    decay = torch.exp(-tau * steps.to(cosines.dtype) / num_steps).unsqueeze(1)
    return (cosines - (1 - beta) * decay) / beta


def threshold_levels(
    cosines: Tensor, count: int, *, agreeing: Tensor | None = None, per_layer: bool = False, min_layers: int = 1
) -> list[float | list[float | None]]:
    """
    Thresholds of one stream from careful to fast, whose mean depths are spread evenly; no two give the same depths.

    With one threshold for all layers it is a quantile of all cosines. With one per layer, an encoder stream lets the
    same share of the rows that are left go after every layer; the decoder lets as many tokens go as have the same
    share of disagreement with the last layer, and none where even the surest disagree more often.

    Args:
        cosines (`Tensor` [rows, layers]): recorded ones; rows without the stream are ignored.
        count (`int`): how many are wanted at most.
        agreeing (`BoolTensor` [rows, layers], *optional*): whether a layer's output is the last one's, for a decoder.
        per_layer (`bool`, *optional*, defaults to `False`): one threshold for each layer.
        min_layers (`int`, *optional*, defaults to 1): no row leaves before this many layers.

    Returns:
        list of numbers, or of lists with one entry per layer.
    """
    present = ~cosines.isnan().all(dim=1)
    # Without the noise of the last bits, which other batches would change.
    cosines = cosines[present].double().round(decimals=6)
    layers = cosines.shape[1]
    open_layers = range(min_layers - 1, layers - 1)
    if not len(cosines) or not len(open_layers):
        return []
    shares = [step / GRID for step in range(1, GRID + 1)]
    values = cosines[:, open_layers.start : open_layers.stop].flatten().sort(descending=True).values
    tried: list[Any] = [_below(values, round(share * len(values))) for share in shares]
    if per_layer:
        if agreeing is None:
            leaving = [lambda order, _, s=s: round(s * len(order)) for s in shares]
        else:
            right = agreeing[present]
            # Small shares matter most: squares are denser there.
            leaving = [lambda order, layer, s=s: _purest(right[order, layer], s * s) for s in [0.0, *shares]]
        # Rows that are all the same, such as a constant prompt, leave no choice but one threshold for all layers.
        same = bool((cosines == cosines[0]).all())
        tried = (
            [[x] * layers for x in tried] if same else [_layer_thresholds(cosines, open_layers, x) for x in leaving]
        )
    reached: dict[tuple[int, ...], tuple[float, Any]] = {}
    for thresholds in tried:
        every = thresholds if isinstance(thresholds, list) else [thresholds] * layers
        depths = replay(cosines, every, min_layers)
        # What lets nothing go is no level.
        if (depths < layers).any():
            reached.setdefault(tuple(depths.tolist()), (depths.double().mean().item(), thresholds))
    if not reached:
        return []
    levels = list(reached.values())
    least = min(depth for depth, _ in levels)
    targets = [layers - (layers - least) * (step + 1) / count for step in range(count)]

    def nearest(target: float) -> int:
        return min(range(len(levels)), key=lambda i: abs(levels[i][0] - target))

    kept = {nearest(target) for target in targets}
    return [levels[i][1] for i in sorted(kept, key=lambda i: -levels[i][0])]


def _below(values: Tensor, count: int) -> float | None:
    """A threshold that `count` of `values` (descending) are above, and those that equal the last of them, halfway to
    the next; None for none of them, and for all of them one that needs no look."""
    if count == 0:
        return None
    last = values[count - 1].item()
    count = int((values >= last).sum())
    return ALWAYS if count == len(values) else (last + values[count].item()) / 2


def _layer_thresholds(
    cosines: Tensor, open_layers: range, leaving: Callable[[Tensor, int], int]
) -> list[float | None]:
    """Layer by layer a threshold that lets the `leaving` surest of the rows that are left go."""
    thresholds: list[float | None] = [None] * cosines.shape[1]
    running = torch.arange(len(cosines))
    for layer in open_layers:
        order = running[cosines[running, layer].argsort(descending=True)]
        if not len(order):
            # Nobody came this far; those who do in other data have waited long enough.
            thresholds[layer] = thresholds[layer - 1]
            continue
        thresholds[layer] = _below(cosines[order, layer], leaving(order, layer))
        limit = thresholds[layer]
        running = order if limit is None else order[cosines[order, layer] <= limit]
    return thresholds


def _purest(agreeing: Tensor, share: float) -> int:
    """The longest beginning of `agreeing` in which at most `share` is False."""
    wrong = (~agreeing).double().cumsum(0) / torch.arange(1, len(agreeing) + 1)
    within = (wrong <= share).nonzero()
    return int(within[-1]) + 1 if len(within) else 0


__all__ = ["SignalRecorder", "Signals", "replay", "threshold_levels", "without_decay"]
