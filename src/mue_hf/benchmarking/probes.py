"""What is measured while a variant runs, by hooks that are gone afterwards: operations, memory, seconds."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(run: Callable[[], T], device: torch.device, after: nn.Module | None = None) -> tuple[T, int]:
    """What `run` returns, and the most bytes that tensors took beyond what they took at its start, or, with `after`,
    at the last end of that module: on the CPU by the profiler's record of allocations, on CUDA by the allocator."""
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
    taken = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == COUNTING_STARTS:
            taken = peak = 0
        elif event.name() == "[memory]":
            taken += event.nbytes()
            peak = max(peak, taken)
    return output, peak


class Stopwatch:
    """Seconds by name, each moment counted once: for the innermost name that has started, or "bookkeeping"."""

    def __init__(self, device: torch.device):
        self.device, self.names = device, ["bookkeeping"]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.last = 0.0

    def charge(self, name: str) -> None:
        """Books the time since the last reading on `name`."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now

    def start(self, name: str, *_: Any) -> None:
        # What the encoder does between its layers prepares the next one: the position bias of its stream.
        self.charge(name if self.names[-1] == "encoder" else self.names[-1])
        self.names.append(name)

    def stop(self, *_: Any) -> None:
        self.charge(self.names.pop())

    def hooks(self, module: nn.Module, start: str | Callable[..., Any]) -> list[Any]:
        """Handles of hooks that charge a module's seconds on a name, or on the one that a pre-hook starts."""
        start = partial(self.start, start) if isinstance(start, str) else start
        return [module.register_forward_pre_hook(start), module.register_forward_hook(self.stop)]

    def time(self, run: Callable[[], Any], handles: Iterable[Any]) -> dict[str, float]:
        """The seconds of one run by name; the hooks are removed."""
        with hooked(*handles):
            synchronize(self.device)
            self.last = time.perf_counter()
            run()
            self.charge("bookkeeping")
        return self.seconds


def component_seconds(model: Any, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one `run` of a model by component, from hooks at the modules.

    Args:
        model (`MuEForConditionalGeneration` or `StockModel`): what runs.
        run (`Callable`): one `generate` call.

    Returns:
        `dict`: "trunk", "image_encoder" and "text_encoder" ("encoder" in the joint mode), "cross_keys" (the decoder's
        keys and values of the encoder's output), "decoder_layers", "head", and "bookkeeping": all the rest, such as
        position biases and the cache of the decoder, beam search and the decision to exit.
    """
    inner = model.model if isinstance(model, StockModel) else model
    encoder, layers, joint = inner.get_encoder(), inner.get_decoder().layers, not inner.config.modality_decomposition
    watch, image_tokens = Stopwatch(inner.device), 0

    def note_image(_: nn.Module, __: tuple, projected: torch.Tensor) -> None:
        nonlocal image_tokens
        image_tokens = projected.shape[1]

    def start_stream(_: nn.Module, inputs: tuple) -> None:
        watch.start("image_encoder" if inputs[0].shape[1] == image_tokens else "text_encoder")

    handles = [encoder.image_proj.register_forward_hook(note_image)]
    for name, module in {"trunk": encoder.embed_images, "encoder": encoder, "head": model.lm_head}.items():
        handles += watch.hooks(module, name)
    for layer in layers:
        handles += watch.hooks(layer, "decoder_layers")
        cross = layer.cross_attn
        # under an engine it is these projections alone
        for module in (cross.k_proj, cross.v_proj) if hasattr(cross, "k_proj") else (cross,):
            handles += watch.hooks(module, "cross_keys")
    for layer in () if joint else encoder.layers:
        handles += watch.hooks(layer, start_stream)
    seconds = watch.time(run, handles)
    if not joint:
        # The encoder's own end joins the streams.
        seconds["image_encoder"] += seconds["encoder"]
    streams = ("encoder",) if joint else ("image_encoder", "text_encoder")
    names = ["trunk", *streams, "cross_keys", "decoder_layers", "head", "bookkeeping"]
    return {name: seconds[name] for name in names}


__all__ = ["Stopwatch", "component_seconds", "count_flops", "hooked", "peak_bytes"]
