# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Caption with a model that does not fit on one device: accelerate spreads its parts over devices and files.

    python examples/big_model.py photo.jpg --model OFA --memory 0=8GiB cpu=24GiB

Parts go to the devices of --memory in order, as far as its sizes reach, and those left over to files, which are read
whenever such a part runs. A layer that an exit skips is not read: exits save the more, the slower the place of the
upper layers is.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor


def device_memory(text: str) -> tuple[int | str, str]:
    """0=8GiB -> (0, "8GiB")."""
    device, _, size = text.partition("=")
    if not size:
        raise argparse.ArgumentTypeError(f"DEVICE=SIZE is needed, such as cpu=24GiB, got {text!r}")
    return int(device) if device.isdigit() else device, size


def main(argv: list[str] | None = None) -> list[str]:
    """Captions the photos and says where the parts of the model are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, default=[Path("examples/photos/cat.jpg")])
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--memory", nargs="+", type=device_memory, help="DEVICE=SIZE ...; default: all there is")
    parser.add_argument("--threshold", type=float, default=0.95, help="similarity above which streams and tokens exit")
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    memory = dict(args.memory) if args.memory else None
    with tempfile.TemporaryDirectory() as folder:
        model = MuEForConditionalGeneration.from_pretrained(
            args.model, dtype=torch.float32, device_map="auto", max_memory=memory, offload_folder=folder
        ).eval()
        # absent where all of it is in one place
        print("parts by place:", dict(Counter(getattr(model, "hf_device_map", {}).values())))
        inputs = processor(images=[Image.open(photo) for photo in args.photos]).to(model.device)
        names = ("image_exit_threshold", "text_exit_threshold", "decoder_exit_threshold")
        tokens = model.generate(**inputs, **dict.fromkeys(names, args.threshold))
        captions = processor.post_process_captions(tokens)
    for photo, caption in zip(args.photos, captions, strict=True):
        print(f"{photo}: {caption}")
    return captions


if __name__ == "__main__":
    main()
