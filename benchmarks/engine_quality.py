"""What an engine and its precision change of captions: exports beside torch on the images of a data set.

    mue-hf export checkpoints/mue-photos-small runs/photos-int8 --int8
    python benchmarks/engine_quality.py --model checkpoints/mue-photos-small --exports runs/photos-int8 \\
        --preset balanced --data DATA.jsonl --split test

Captions are greedy, of five beams, and with --preset greedy under its exits. Torch takes batches of --batch-size, in
which a row does not depend on the others; exports take one image a call. "same" is the share of captions that are
torch's, "flip" the share of the first --flips images whose caption is another in batches of --batch-size than alone.
CIDEr is over all images, with the plain tokenizer. Layers are means over images, and over tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import make_parser, write_results

from mue_hf.benchmarking.tables import markdown_table
from mue_hf.cli.options import at_least
from mue_hf.data.captioning import load_captioning
from mue_hf.evaluation.measure import environment
from mue_hf.inference.loading import load_checkpoint
from mue_hf.inference.predict import Prediction, predict
from mue_hf.metrics.captions import caption_scores

TORCH = "torch"


def settings(preset: str | None) -> dict[str, dict[str, Any]]:
    """Name -> options of `generate`."""
    plain = {"greedy": 1, "five beams": 5}
    found: dict[str, dict[str, Any]] = {
        name: {"num_beams": beams, "exit_criterion": "never"} for name, beams in plain.items()
    }
    return found if preset is None else found | {preset: {"num_beams": 1, "exit_preset": preset}}


def mean_depths(found: Sequence[Prediction]) -> list[float]:
    """Mean layers of image and text, over images, and of the decoder, over tokens."""
    layers = [depth for one in found for depth in one.decoder_exit_layers]
    streams = (sum(getattr(one, f"{name}_exit_layers") for one in found) / len(found) for name in ("image", "text"))
    return [*streams, sum(layers) / len(layers)]


def differ(ones: Sequence[Prediction], others: Sequence[Prediction]) -> float:
    """The share of captions that differ; the shorter sequence counts."""
    pairs = list(zip(ones, others, strict=False))
    return sum(one.output != other.output for one, other in pairs) / len(pairs)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record: figures by model and setting."""
    torch.set_num_threads(args.threads)
    rows = [row for source in args.data for row in load_captioning(source, args.split)]
    references = [row["references"] for row in rows]
    few, size = rows[: args.flips], args.batch_size
    model, processor = load_checkpoint(args.model)
    record = {name: getattr(args, name) for name in ("model", "data", "split", "flips")}
    record |= {"images": len(rows), "environment": environment(model, size), "models": {}}
    models = {TORCH: None} | {Path(folder).name: folder for folder in args.exports}
    torchs = {}
    for name, folder in models.items():
        if folder is not None:
            model, _ = load_checkpoint(folder, engine="onnxruntime")
        figures = record["models"][name] = {}
        for setting, options in settings(args.preset).items():
            given = model, processor
            alone = {"task": "captioning", "options": options, "batch_size": size if folder is None else 1}
            found = predict(*given, rows, **alone)
            torchs.setdefault(setting, found)
            scores = caption_scores([one.output for one in found], references, metrics=["cider"], tokenizer="plain")
            mates = predict(*given, few, **alone | {"batch_size": 1 if folder is None else size})
            figures[setting] = {
                "same": 1 - differ(found, torchs[setting]),
                "flip": differ(found, mates),
                "cider": scores["cider_plain"],
                "depths": mean_depths(found),
            }
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        {
            "engine": name,
            "decoding": setting,
            "same": f"{found['same']:.3f}",
            "flip": f"{found['flip']:.3f}",
            "CIDEr": f"{found['cider']:.3f}",
            "layers of image / text / token": " / ".join(f"{depth:.3f}" for depth in found["depths"]),
        }
        for name, figures in record["models"].items()
        for setting, found in figures.items()
    ]
    machine = record["environment"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    head = f"{record['model']}, {record['images']} images of the split {record['split']}, flips on the first "
    head += f"{record['flips']} in batches of {machine['batch_size']} ({machine['hardware']}, {versions})."
    return "\n".join([head, "", *markdown_table(rows)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=None)
    parser.add_argument("--model", required=True, help="a checkpoint folder, for torch")
    parser.add_argument("--exports", nargs="+", required=True, metavar="DIR", help="folders of `mue-hf export`")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="what `load_captioning` takes")
    parser.add_argument("--split", default="test", help="(test)")
    parser.add_argument("--preset", metavar="NAME", help="exits of one more row each")
    parser.add_argument("--batch-size", type=at_least(2), default=16, metavar="N", help="(16)")
    parser.add_argument("--flips", type=at_least(1), default=160, metavar="N", help="images (160)")
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="(1)")
    args = parser.parse_args(argv)
    record = measure(args)
    write_results(args, record, markdown(record))


if __name__ == "__main__":
    main()
