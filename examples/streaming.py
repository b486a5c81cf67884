# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Fine-tune on a stream (Hugging Face datasets): rows are read when they are needed, none is kept.

    python examples/streaming.py --model OFA --data org/captions --output runs/streaming --steps 10000

Nothing is downloaded before training starts, and data may be larger than the disk. A stream has no length: --steps
says when to stop. Rows are shuffled within a buffer; several loader workers or processes share the files of the data,
so give it at least as many files as there are of them.
"""

import argparse
from collections.abc import Iterator

import torch
from datasets import IterableDataset

from mue_hf import (
    MuEDataCollator,
    MuEForConditionalGeneration,
    MuEProcessor,
    MuETrainer,
    MuETrainingArguments,
    SceneDataset,
    load_captioning,
)
from mue_hf.data import CAPTIONING_FEATURES


def scenes(seed: int, count: int, parts: list[int]) -> Iterator[dict]:
    """Every fourth scene, from each number in `parts` on; `datasets` divides lists among workers."""
    drawn = SceneDataset(count, seed, statements=0)
    for part in parts:
        for index in range(part, count, 4):
            yield drawn[index]


def stream(source: str) -> IterableDataset:
    """The rows of generated scenes (scenes:SEED:COUNT), or of what `load_captioning` reads."""
    if not source.startswith("scenes:"):
        return load_captioning(source, streaming=True)
    seed, count = map(int, source.split(":")[1:])
    options = {"seed": seed, "count": count, "parts": [0, 1, 2, 3]}
    return IterableDataset.from_generator(scenes, features=CAPTIONING_FEATURES, gen_kwargs=options)


def main(argv: list[str] | None = None) -> None:
    """Trains on the stream and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--data", default="scenes:0:1000", help="what load_captioning reads, or scenes:SEED:COUNT")
    parser.add_argument("--output", default="runs/streaming")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes that read and decode")
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    trainer = MuETrainer(
        MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32),
        MuETrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            dataloader_num_workers=args.workers,
            learning_rate=3e-5,
            logging_steps=5,
            save_strategy="no",
        ),
        train_dataset=stream(args.data).shuffle(seed=0, buffer_size=100),
        data_collator=MuEDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
