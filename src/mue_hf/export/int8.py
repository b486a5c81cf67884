"""Graphs in 8 bits: dynamic for matrices, static for the trunk, whose ranges come from images; which parts stay in
float32."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from .graphs import quiet

# How the trunk is quantised, as the manifest has it. A convolution goes with what clips its output: alone it would
# spend its 8 bits on values that are cut off. Additions of residuals stay in float32: in 8 bits they were slower.
STATIC_OPTIONS = {
    "method": "MinMax",
    "weights": "QInt8, a scale for each output channel",
    "activations": "QUInt8",
    "operators": ["Conv", "Clip", "Relu"],
}
# Images in one run of the trunk while ranges are taken.
IMAGES_AT_ONCE = 4


def dynamic_int8(graph: Any) -> Any:
    """A graph in dynamic int8: the weights of its matrices are int8 with a scale for each output (per channel), their
    inputs are made 8 bits wide in each call, with one scale for all of them (per tensor)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder, quiet():
        path = Path(folder, "graph.onnx")
        quantize_dynamic(graph, path, per_channel=True, weight_type=QuantType.QInt8)
        return _read(path, graph)


def static_int8(graph: Any, batches: Iterable[Tensor]) -> Any:
    """The graph of a trunk in static int8: weights and values of its convolutions, see `STATIC_OPTIONS`.

    Args:
        graph: its one input is pixels.
        batches (iterable of `Tensor` [images, 3, height, width]): of which the ranges of all values are taken.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({graph.graph.input[0].name: batch.numpy()} for batch in batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with TemporaryDirectory() as folder, quiet():
        source, prepared, path = (Path(folder, f"{name}.onnx") for name in ("source", "prepared", "graph"))
        # from memory it would move the values of shapes to a file, in which shape inference does not look
        source.write_bytes(graph.SerializeToString())
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=STATIC_OPTIONS["operators"],
            calibrate_method=CalibrationMethod.MinMax,
        )
        return _read(path, graph)


def _read(path: Path, graph: Any) -> Any:
    result = type(graph)()
    result.ParseFromString(path.read_bytes())
    return result


def in_float(names: Iterable[str], patterns: Sequence[str]) -> Iterator[str]:
    """Those of the graphs `names` that `patterns` name, each a name or one with wildcards, as in "encoder_*".

    Raises:
        ValueError: if a pattern names none of them.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`keep_float` must name graphs that would be in int8, got {pattern!r}, which is none of {names}; "
                'check the spelling, "encoder_*" names all that begin so.'
            )
    return (name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


__all__ = ["IMAGES_AT_ONCE", "STATIC_OPTIONS", "dynamic_int8", "in_float", "static_int8"]
