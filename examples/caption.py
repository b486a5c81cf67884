# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm]"]
# ///
"""Captions one photo with exits and at full depth, in Python instead of `mue-hf caption`.

Run from the root of the repository, after `make demo` has made the environment:

    .venv/bin/python examples/caption.py examples/photos/cat.jpg
    .venv/bin/python examples/caption.py photo.jpg --model path/to/checkpoint --decoder-threshold 0.9
"""

import argparse

import torch
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor


def main() -> None:
    """Prints both captions and the depth of every token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--model", default="checkpoints/mue-photos-small")
    parser.add_argument("--image-threshold", type=float, default=0.99)
    parser.add_argument("--text-threshold", type=float, default=0.99)
    parser.add_argument("--decoder-threshold", type=float, default=0.95)
    args = parser.parse_args()

    processor = MuEProcessor.from_pretrained(args.model)
    model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    with Image.open(args.image) as image:
        # Without a text the processor uses OFA's captioning prompt.
        inputs = processor(images=image, return_tensors="pt")

    full = model.generate(**inputs, exit_criterion="never")
    print("at full depth:", processor.decode(full[0], skip_special_tokens=True).strip())

    # The cosine between a layer's output and its input says when to exit; see mue_hf/model/criteria_mue.py.
    output = model.generate(
        **inputs,
        image_exit_threshold=args.image_threshold,
        text_exit_threshold=args.text_threshold,
        decoder_exit_threshold=args.decoder_threshold,
        return_dict_in_generate=True,
    )
    print("with exits:   ", processor.decode(output.sequences[0], skip_special_tokens=True).strip())
    print(f"image stream:  {int(output.image_exit_layers[0])} of {model.config.layers_of('image')} layers")
    print(f"text stream:   {int(output.text_exit_layers[0])} of {model.config.layers_of('text')} layers")
    # The sequence starts with the decoder's start token, which no layer produced.
    for token, depth in zip(output.sequences[0, 1:].tolist(), output.decoder_exit_layers[0].tolist(), strict=True):
        print(f"{processor.decode([token])!r:>14}  {depth} of {model.config.decoder_layers} layers")


if __name__ == "__main__":
    main()
