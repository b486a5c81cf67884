"""A checkpoint of OFA's shapes with random weights, the same as `mue-hf bench --size` times, to export and to time.

The processor, tokenizer and prompt are those of another checkpoint, for another image size; captions mean nothing.

    python benchmarks/random_checkpoint.py runs/base --size base --image-size 480 \\
        --processor checkpoints/mue-photos-small
    mue-hf export runs/base runs/base-onnx
    mue-hf bench --model runs/base --exports runs/base-onnx --variants stock lossless half --threads 1
"""

import argparse
from pathlib import Path

from mue_hf.benchmarking.models import with_random_weights
from mue_hf.files import whole_folder
from mue_hf.inference.loading import SMALL_CHECKPOINT
from mue_hf.model.configuration_mue import SIZES
from mue_hf.model.processing_mue import MuEProcessor


def main(argv: list[str] | None = None) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        ValueError: for a folder that is not empty, an image size that cannot be, and a processor with more tokens than
            the shapes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where nothing is, or an empty folder")
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="OFA's shapes (base)")
    parser.add_argument("--image-size", type=int, default=480, metavar="PX", help="pixels of both sides (480)")
    parser.add_argument("--processor", default=str(SMALL_CHECKPOINT), metavar="CKPT", help=f"({SMALL_CHECKPOINT})")
    args = parser.parse_args(argv)
    with whole_folder(args.folder) as folder:
        model = with_random_weights(args.size, args.image_size)
        processor = MuEProcessor.from_pretrained(args.processor)
        tokens, most = len(processor.tokenizer), model.config.num_text_tokens
        if tokens > most:
            raise ValueError(f"`--processor` must have at most {most} tokens, got {tokens}; name another checkpoint.")
        processor.image_processor.size = {"height": args.image_size, "width": args.image_size}
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
