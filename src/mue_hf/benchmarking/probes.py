"""What is measured while a variant runs, in passes of their own: operations, memory, seconds by component.

Everything is done by hooks that are gone afterwards; the passes that are timed as a whole carry none but those of
`encoder_clock`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from ..inference.flops import CPU_ATTENTION
from ..inference.timing import synchronize
from .stock import StockModel

T = TypeVar("T")
COUNTING_STARTS = "mue_hf: counting starts"


def count_flops(run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and the FLOPs of its matrix products and convolutions (one multiply-add is 2).

    No parameter of what runs may require a gradient: torch's counter follows modules through the graph, which
    `generate` does not build.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        output = run()
    return output, counter.get_total_flops()


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Removes the hooks at its end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def peak_bytes(run: Callable[[], T], device: torch.device, after: nn.Module | None = None) -> tuple[T, int]:
    """
    What `run` returns, and the most bytes that tensors took beyond what they took at its start, or, with `after`, at
    the last end of that module.

    On the CPU by the profiler's record of allocations, on CUDA by the allocator.
    """
    on_cuda, before = device.type == "cuda", 0

    def start(*_: Any) -> None:
        nonlocal before
        if on_cuda:
            synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with record_function(COUNTING_STARTS):
                pass

    recording: Any = nullcontext() if on_cuda else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with hooked(*([] if after is None else [after.register_forward_hook(start)])), recording as record:
        start()
        output = run()
    if on_cuda:
        synchronize(device)
        return output, torch.cuda.max_memory_allocated(device) - before
    events = record.profiler.kineto_results.events()
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == COUNTING_STARTS:
            taken = peak = 0
        elif event.name() == "[memory]":
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
    """Seconds by name, each moment counted once: for the innermost name that has started."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.names = ["bookkeeping"]
        self.last = self._now()
        self.image_tokens = 0

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def charge(self, name: str) -> None:
        """Books the time since the last reading on `name`."""
        now = self._now()
        self.seconds[name] += now - self.last
        self.last = now

    def start(self, name: str) -> None:
        # What the encoder does between its layers prepares the next one: the position bias of its stream.
        self.charge(name if self.names[-1] == "encoder" else self.names[-1])
        self.names.append(name)

    def stop(self, *_: Any) -> None:
        self.charge(self.names.pop())

    def start_stream(self, _: nn.Module, inputs: tuple) -> None:
        """Starts the stream of an encoder layer, told by its tokens."""
        self.start("image_encoder" if inputs[0].shape[1] == self.image_tokens else "text_encoder")

    def note_image(self, _: nn.Module, __: tuple, projected: torch.Tensor) -> None:
        self.image_tokens = projected.shape[1]


def component_seconds(model: Any, run: Callable[[], Any]) -> dict[str, float]:
    """
    Seconds of one `run` of a model by component, from hooks at the modules.

    Args:
        model (`MuEForConditionalGeneration` or `StockModel`): what runs.
        run (`Callable`): one `generate` call.

    Returns:
        `dict`: "trunk", "image_encoder" and "text_encoder" ("encoder" in the joint mode), "cross_keys" (the decoder's
        keys and values of the encoder's output), "decoder_layers", "head", and "bookkeeping": all the rest, such as
        position biases and the cache of the decoder, beam search and the decision to exit.
    """
    stock, joint = isinstance(model, StockModel), not model.config.modality_decomposition
    inner = model.model if stock else model
    encoder = inner.get_encoder()
    layers = model.layers if stock else inner.get_decoder().layers
    named = {
        "trunk": [encoder.embed_images],
        "encoder": [encoder],
        "cross_keys": [linear for layer in layers for linear in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)],
        "decoder_layers": layers,
        "head": [model.lm_head],
    }
    watch = _Stopwatch(inner.device)
    handles = [encoder.image_proj.register_forward_hook(watch.note_image)]
    for name, modules in named.items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.start(name)))
            handles.append(module.register_forward_hook(watch.stop))
    for layer in () if joint else encoder.layers:
        handles.append(layer.register_forward_pre_hook(watch.start_stream))
        handles.append(layer.register_forward_hook(watch.stop))
    with hooked(*handles):
        watch.charge("start")
        run()
        watch.charge("bookkeeping")
    streams = ["encoder"] if joint else ["image_encoder", "text_encoder"]
    if not joint:
        # The encoder's own end joins the streams.
        watch.seconds["image_encoder"] += watch.seconds["encoder"]
    names = ["trunk", *streams, "cross_keys", "decoder_layers", "head", "bookkeeping"]
    return {name: watch.seconds[name] for name in names}


__all__ = ["component_seconds", "count_flops", "encoder_clock", "hooked", "peak_bytes"]
