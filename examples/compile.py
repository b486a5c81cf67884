# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm]"]
# ///
"""Compile the layers with torch.compile and compare with eager: the same tokens, and the time of both, in turns.

    python examples/compile.py photo.jpg --model OFA --repeats 20

A layer is what lies between two exit decisions, so layers are compiled and the loop around them is not: exits work as
ever. Whether it is faster depends on the machine; docs/speed.md has a CPU on which it is not.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor
from mue_hf.inference.timing import compare


def compile_layers(model: MuEForConditionalGeneration, backend: str) -> None:
    """Compiles each layer of encoder and decoder in place, for any number of rows and tokens."""
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.compile(dynamic=True, backend=backend)


def main(argv: list[str] | None = None) -> dict[str, list]:
    """Captions one photo with both models; returns the tokens of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path, default=Path("examples/photos/cat.jpg"))
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; needs a C++ compiler on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that compiles")
    parser.add_argument("--threshold", type=float, default=0.95, help="similarity above which a token exits")
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    inputs = processor(images=Image.open(args.photo)).to(args.device)
    calls = {}
    for name in ("eager", "compiled"):
        model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
        if name == "compiled":
            compile_layers(model, args.backend)
        calls[name] = partial(model.generate, **inputs, decoder_exit_threshold=args.threshold)
    outputs, seconds = compare(calls, args.repeats, torch.device(args.device))
    tokens = {name: output.tolist() for name, output in outputs.items()}
    print("same tokens" if tokens["eager"] == tokens["compiled"] else "other tokens: rounding decided a close call")
    for name, taken in seconds.items():
        print(f"{name:9} {1000 * taken:8.1f} ms, median of {args.repeats}")
    return tokens


if __name__ == "__main__":
    main()
