# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Caption with a model that does not fit on one device: accelerate spreads its layers over devices and files.

    python examples/big_model.py photo.jpg --model OFA --memory 0=8GiB cpu=24GiB

device_map="auto" is enough where the whole model fits on one device. Otherwise layers go to the devices of --memory in
order, as far as its sizes reach, and those left over to files, which are read whenever such a layer runs. Everything
but the layers stays on the first device: the layers share position tables there, so "auto" must not part them. A layer
that an exit skips is not read: exits save the more, the slower the place of the upper layers is.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from PIL import Image

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor


def device_memory(text: str) -> tuple[int | str, str]:
    """0=8GiB -> (0, "8GiB")."""
    device, _, size = text.partition("=")
    if not size:
        raise argparse.ArgumentTypeError(f"DEVICE=SIZE is needed, such as cpu=24GiB, got {text!r}")
    return int(device) if device.isdigit() else device, size


def spread(config: MuEConfig, memory: dict[int | str, str]) -> dict[str, int | str]:
    """A device map: encoder and decoder layers in order where there is room, the rest on the first device."""
    with init_empty_weights():
        empty = MuEForConditionalGeneration(config)
    stacks = {"encoder": empty.model.encoder, "decoder": empty.model.decoder}
    layers = torch.nn.ModuleList(layer for stack in stacks.values() for layer in stack.layers)
    places = infer_auto_device_map(
        layers, memory, no_split_module_classes=list(empty._no_split_modules), dtype=torch.float32, clean_result=False
    )
    names = [f"model.{stack}.layers.{index}" for stack in stacks for index in range(len(stacks[stack].layers))]
    rest = [f"model.{name}.{part}" for name, stack in stacks.items() for part, _ in stack.named_children()]
    rest = ["lm_head", "model.shared", *(part for part in rest if not part.endswith(".layers"))]
    return dict.fromkeys(rest, next(iter(memory))) | dict(zip(names, places.values(), strict=True))


def main(argv: list[str] | None = None) -> list[str]:
    """Captions the photos and says where the layers are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, default=[Path("examples/photos/cat.jpg")])
    parser.add_argument("--model", default="checkpoints/mue-flickr8k-small", help="checkpoint folder or Hub id")
    parser.add_argument("--memory", nargs="+", type=device_memory, help="for layers: DEVICE=SIZE ..., the first first")
    parser.add_argument("--threshold", type=float, default=0.95, help="similarity above which streams and tokens exit")
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    device_map: str | dict[str, int | str] = "auto"
    if args.memory:
        device_map = spread(MuEConfig.from_pretrained(args.model), dict(args.memory))
        print("layers by place:", dict(Counter(place for name, place in device_map.items() if ".layers." in name)))
    with tempfile.TemporaryDirectory() as folder:
        model = MuEForConditionalGeneration.from_pretrained(
            args.model, dtype=torch.float32, device_map=device_map, offload_folder=folder
        ).eval()
        inputs = processor(images=[Image.open(photo) for photo in args.photos]).to(model.device)
        names = ("image_exit_threshold", "text_exit_threshold", "decoder_exit_threshold")
        tokens = model.generate(**inputs, **dict.fromkeys(names, args.threshold))
        captions = processor.post_process_captions(tokens)
    for photo, caption in zip(args.photos, captions, strict=True):
        print(f"{photo}: {caption}")
    return captions


if __name__ == "__main__":
    main()
