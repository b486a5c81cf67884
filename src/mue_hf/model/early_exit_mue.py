"""Early exit, once: the layer loop that takes exited rows out of the batch, who decides, and Theta(t) in `generate`.

Encoder streams and decoder call `run_stack`; nothing else in the package decides when a row stops.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .criteria_mue import CRITERIA, ExitPolicy, LayerStates


class ExitDecider:
    """Decides layer by layer which rows exit, for one call of one stack.

    Args:
        policy (`ExitPolicy`): what to decide by.
        mask (`BoolTensor` [rows, positions], *optional*): the positions that count; all by default.
        predict (`Callable`, *optional*): states [rows, d] -> logits [rows, classes] of that depth's output. Needed for
            criteria that look at intermediate logits.
    """

    def __init__(self, policy: ExitPolicy, mask: Tensor | None = None, predict: Callable | None = None):
        self.policy = policy
        self.mask = mask
        self.predict = predict
        self.criterion = CRITERIA[policy.criterion](policy)

    def check(self, num_rows: int) -> None:
        """Raises a ValueError if the policy has depths for another number of rows."""
        depth = self.policy.depth
        if isinstance(depth, Tensor) and len(depth) != num_rows:
            raise ValueError(
                f"an exit layer that is a tensor must hold one depth per row of its stream, {num_rows}, got "
                f"{len(depth)}; pass as many, or one number for all."
            )

    def __call__(self, layer: int, previous: Tensor, current: Tensor, rows: Tensor | None) -> Tensor | None:
        """Which rows exit after layer `layer` (0-based), as a BoolTensor [rows] on the CPU; None for no row.

        Args:
            previous, current (`Tensor` [rows, positions, d]): the layer's input and output.
            rows (`LongTensor` [rows], *optional*): which rows of the call these are; all by default.
        """
        if self.policy.is_never:
            return None
        mask = self.mask if self.mask is None or rows is None else self.mask[rows]
        allowed = self.policy.allowed
        allowed = allowed if allowed is None or rows is None else allowed[rows]
        exits = self.criterion.exits(LayerStates(layer, previous, current, mask, rows, self.predict, allowed))
        return None if exits is None else exits.cpu()


@dataclass
class ExitRecord:
    """What every output of the model says about its exits; a mixin of the output classes. None where nobody asked.

    Args:
        image_exit_layers, text_exit_layers (`LongTensor` [samples]): layers that each stream ran; 0 without one.
        decoder_exit_layers (`LongTensor` [rows]): layers run by each decoder row in a call; of `generate`
            [sequences, new tokens], 0 where a sequence has no token any more; of `score_answers` [samples, branching
            nodes of the answers' trie].
        executed_layers (`dict[str, int]`): "image", "text", "decoder": how often a layer ran, as rows x tokens, which
            is what forward hooks count. More than the depths say where `exit_kv="exact"` caught up, and with beams.
    """

    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None

    def __post_init__(self) -> None:
        # that of `ModelOutput` enters what assignments entered already, and takes a lone field apart
        if len(self) < 2:
            super().__post_init__()

    def __setattr__(self, name: str, value: Any) -> None:
        # As `ModelOutput` does, which lists all fields at each assignment: of several outputs a step, each of many.
        name = self._replace_old_cache_name(name)
        if value is not None and name in self.__dataclass_fields__:
            OrderedDict.__setitem__(self, name, value)
        object.__setattr__(self, name, value)

    def exit_record(self) -> dict[str, Any]:
        """The fields above by name."""
        return {field.name: getattr(self, field.name) for field in fields(ExitRecord)}


class StackResult(NamedTuple):
    """What `run_stack` returns: states [rows, positions, d] of each row's exit, depths [rows] (on the CPU), how often
    a layer ran (rows x positions), and the states after every layer if asked for."""

    states: Tensor
    depths: Tensor
    executed: int
    hidden_states: tuple[Tensor, ...] | None


def run_stack(
    states: Tensor,
    num_layers: int,
    run_layer: Callable[[int, Tensor, Tensor | None], Tensor],
    decider: ExitDecider,
    rows: Tensor | None = None,
    output_hidden_states: bool = False,
) -> StackResult:
    """Runs a stack of layers; a row that exits leaves the batch before the next layer (batch compaction).

    Args:
        states (`Tensor` [batch, positions, d]): input of the first layer.
        num_layers (`int`): layers in the stack.
        run_layer (`Callable`): (layer, states [rows, positions, d], rows or None for all) -> states of that layer.
        decider (`ExitDecider`): which rows exit.
        rows (`LongTensor`, *optional*): the rows that take part, in ascending order; the others keep their input and
            have depth 0.
        output_hidden_states (`bool`): return input and output of all layers; an exited row repeats its exit state.

    Raises:
        ValueError: if the policy has depths for another number of rows.
    """
    decider.check(len(states))
    final, depths = states, torch.zeros(states.shape[0], dtype=torch.long)
    running = states if rows is None else states[rows]
    history = [states] if output_hidden_states else None
    executed = depth = 0
    while depth < num_layers and running.shape[0]:
        previous, running = running, run_layer(depth, running, rows)
        depth += 1
        executed += running.shape[0] * running.shape[1]
        if history is not None:
            history.append(_put_rows(history[-1], rows, running))
        exits = decider(depth - 1, previous, running, rows) if depth < num_layers else None
        if exits is None or not exits.any():
            continue
        if exits.all():
            break
        rows = torch.arange(len(depths)) if rows is None else rows
        final = _put_rows(final, rows[exits], running[exits])
        depths[rows[exits]] = depth
        rows, running = rows[~exits], running[~exits]
    depths[slice(None) if rows is None else rows] = depth
    return StackResult(_put_rows(final, rows, running), depths, executed, history and tuple(history))


def _put_rows(states: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else states.index_put((rows.to(states.device),), values)


class ExitSchedule:
    """Theta(t) in `generate`: the decoder's policy at each step.

    Args:
        policy (`ExitPolicy`): the decoder's policy, undecayed.
        prompt_length (`int`): decoder tokens before the first new one.
        num_steps (`int`): N, the greatest number of new tokens of the call.
    """

    def __init__(self, policy: ExitPolicy, prompt_length: int, num_steps: int):
        self.base_policy = policy
        self.prompt_length = prompt_length
        self.num_steps = max(num_steps, 1)

    def policy(self, length: int) -> ExitPolicy:
        """The policy of the token that follows `length` decoder tokens."""
        # a prompt that is read in parts is at step 0
        return self.base_policy.at_step(max(length - self.prompt_length, 0), self.num_steps)


__all__ = ["ExitDecider", "ExitRecord", "ExitSchedule", "StackResult", "run_stack"]
