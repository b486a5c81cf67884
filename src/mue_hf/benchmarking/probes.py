"""What is looked at while an arm runs, in passes of their own: operations, memory of the decode, seconds by component.

Everything is done by hooks that are gone afterwards; the passes that are timed as a whole carry none of these.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ..inference.flops import CPU_ATTENTION
from .stock import StockModel

DECODE_STARTS = "mue_hf: decode starts"


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and the FLOPs of its matrix products and convolutions (one multiply-add is 2).

    No parameter of what runs may require a gradient: torch's counter follows modules through the graph, which
    `generate` does not build.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        output = run()
    return output, counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Waits for the device's work; the CPU has none waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Removes the hooks at its end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def decode_peak(run: Callable[[], Any], encoder: nn.Module, device: torch.device) -> tuple[Any, int]:
    """
    What `run` returns, and the most bytes that tensors took after the encoder's end beyond what they took then.

    On the CPU by the profiler's record of allocations, on CUDA by the allocator.
    """
    before = 0

    def mark(*_: Any) -> None:
        nonlocal before
        if device.type == "cuda":
            synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with record_function(DECODE_STARTS):
                pass

    with hooked(encoder.register_forward_hook(mark)):
        if device.type == "cuda":
            output = run()
            synchronize(device)
            return output, torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            output = run()
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() in ("[memory]", DECODE_STARTS)
    ]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == DECODE_STARTS:
            taken = peak = 0
        else:
            taken += event.nbytes()
            peak = max(peak, taken)
    return output, peak


@contextmanager
def encoder_clock(encoder: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """A list that receives the seconds of every pass of the encoder: two readings of the clock per `generate`."""
    seconds: list[float] = []

    def start(*_: Any) -> None:
        synchronize(device)
        seconds.append(-time.perf_counter())

    def stop(*_: Any) -> None:
        synchronize(device)
        seconds[-1] += time.perf_counter()

    with hooked(encoder.register_forward_pre_hook(start), encoder.register_forward_hook(stop)):
        yield seconds


class _Stopwatch:
    """Seconds by name, each moment counted once: for the innermost name that has been entered."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.names = ["bookkeeping"]
        self.last = self._now()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def charge(self, name: str) -> None:
        """Books the time since the last reading on `name`."""
        now = self._now()
        self.seconds[name] += now - self.last
        self.last = now

    def enter(self, name: str) -> None:
        # What the encoder does between its layers prepares the next one: the position bias of its stream.
        self.charge(name if self.names[-1] == "encoder" else self.names[-1])
        self.names.append(name)

    def leave(self) -> None:
        self.charge(self.names.pop())


def component_seconds(model: Any, run: Callable[[], Any]) -> dict[str, float]:
    """
    Seconds of one `run` of a model by component, from hooks at the modules.

    Args:
        model (`MuEForConditionalGeneration` or `StockModel`): what runs.
        run (`Callable`): one `generate` call.

    Returns:
        `dict`: "trunk", "image_encoder" and "text_encoder" ("encoder" in the joint mode), "cross_keys" (the decoder's
        keys and values of the encoder's output), "decoder_layers", "head", and "bookkeeping": all the rest, such as
        position biases and the cache of the decoder, beam search and the decision to leave.
    """
    stock = isinstance(model, StockModel)
    inner = model.model if stock else model
    encoder, decoder = inner.get_encoder(), inner.get_decoder()
    joint = not model.config.modality_decomposition
    device, image_tokens = inner.device, 0

    def stream(states: Tensor) -> str:
        if joint:
            return "encoder"
        return "image_encoder" if states.shape[1] == image_tokens else "text_encoder"

    def note_tokens(_: nn.Module, __: Any, projected: Tensor) -> None:
        nonlocal image_tokens
        image_tokens = projected.shape[1]

    layers = model.layers if stock else decoder.layers
    cross = [linear for layer in layers for linear in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)]
    named = {"trunk": [encoder.embed_images], "encoder": [encoder], "head": [model.lm_head]}
    named |= {"decoder_layers": layers, "cross_keys": cross}
    watch = _Stopwatch(device)
    handles = [encoder.image_proj.register_forward_hook(note_tokens)]
    for name, modules in named.items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name)))
            handles.append(module.register_forward_hook(lambda *_: watch.leave()))

    # With hooks at its layers the encoder would not use what it has kept of its prompt: while it runs, hooks of all
    # modules stand in for them.
    in_encoder = set(encoder.layers)
    streams: list[RemovableHandle] = []

    def watch_streams(*_: Any) -> None:
        enter = register_module_forward_pre_hook(
            lambda module, inputs: watch.enter(stream(inputs[0])) if module in in_encoder else None
        )
        leave = register_module_forward_hook(lambda module, *_: watch.leave() if module in in_encoder else None)
        streams.extend((enter, leave))

    def leave_streams(*_: Any) -> None:
        while streams:
            streams.pop().remove()

    handles += [encoder.register_forward_pre_hook(watch_streams), encoder.register_forward_hook(leave_streams)]
    with hooked(*handles):
        watch.last = watch._now()
        try:
            run()
        finally:
            leave_streams()
        watch.charge("bookkeeping")
    names = ["encoder"] if joint else ["image_encoder", "text_encoder"]
    if not joint:
        # The encoder's own end joins the streams.
        watch.seconds["image_encoder"] += watch.seconds["encoder"]
    names = ["trunk", *names, "cross_keys", "decoder_layers", "head", "bookkeeping"]
    return {name: watch.seconds[name] for name in names}


__all__ = ["component_seconds", "count_flops", "decode_peak", "encoder_clock", "hooked", "synchronize"]
