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
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor


def compile_layers(model: MuEForConditionalGeneration, backend: str) -> None:
    """Compiles each layer of encoder and decoder in place, for any number of rows and tokens."""
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.compile(dynamic=True, backend=backend)


def main(argv: list[str] | None = None) -> dict[str, list]:
    """Captions one photo with both models; returns the tokens of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path, default=Path("examples/photos/cat.jpg"))
    parser.add_argument("--model", default="checkpoints/mue-flickr8k-small", help="checkpoint folder or Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; needs a C++ compiler on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threshold", type=float, default=0.95, help="similarity above which a token exits")
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    inputs = processor(images=Image.open(args.photo)).to(args.device)
    models = {}
    for name in ("eager", "compiled"):
        model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
        models[name] = model.to(args.device)
    compile_layers(models["compiled"], args.backend)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    tokens = {}
    # the first round compiles
    for turn in range(args.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            tokens[name] = model.generate(**inputs, decoder_exit_threshold=args.threshold).tolist()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    print("same tokens" if tokens["eager"] == tokens["compiled"] else "other tokens: rounding decided a close call")
    for name, times in seconds.items():
        if times:
            print(f"{name:9} {1000 * median(times):8.1f} ms, median of {len(times)}")
    return tokens


if __name__ == "__main__":
    main()
