# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[peft,timm,train]"]
# ///
"""Fine-tune LoRA adapters on the attention projections with PEFT; ends with the adapters and a merged checkpoint.

    python examples/lora.py --model OFA --data captions.jsonl --output runs/lora

OUTPUT/adapter holds the few trained weights: `PeftModel.from_pretrained(model, folder)` puts them into the model they
were trained on. (`model.load_adapter` of transformers 5.24 asks for PEFT 0.22, which is not out yet.) OUTPUT/merged is
a checkpoint like any other, for evaluating, calibrating, publishing and fast captions: it has no adapters to run.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from mue_hf import MuEDataCollator, MuEForConditionalGeneration, MuEProcessor, MuETrainer, MuETrainingArguments
from mue_hf.evaluation.rows import load_rows

# not those of the image trunk, whose layers may bear the same names
PROJECTIONS = r"model\.(encoder|decoder)\.layers\.\d+\.(self|cross)_attn\.(q|k|v|out)_proj"


def main(argv: list[str] | None = None) -> None:
    """Trains adapters, writes them, and merges them into the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--data", default="scenes:0:64", help="what load_captioning reads, or scenes:SEED:COUNT")
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args(argv)

    # Model
    processor = MuEProcessor.from_pretrained(args.model)
    model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    # puts adapters into `model`, which is what the trainer trains; `adapted` knows how to save and merge them
    adapted = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=PROJECTIONS))
    adapted.print_trainable_parameters()

    # Training
    trainer = MuETrainer(
        model,
        MuETrainingArguments(
            str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            # batch statistics of the frozen trunk stay as they are
            freeze_trunk=True,
        ),
        train_dataset=load_rows("captioning", args.data, "train"),
        data_collator=MuEDataCollator(processor),
    )
    trainer.train()

    if trainer.is_world_process_zero():
        adapted.save_pretrained(args.output / "adapter")
        merged = adapted.merge_and_unload()
        merged.save_pretrained(args.output / "merged")
        processor.save_pretrained(args.output / "merged")


if __name__ == "__main__":
    main()
