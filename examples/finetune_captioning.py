# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train,eval]"]
# ///
"""Fine-tune a MuE checkpoint, such as a converted OFA, on captions; the defaults are the recipe of the MuE paper.

DATA is whatever `mue_hf.data.load_captioning` reads: a JSONL, JSON, CSV or parquet file, an `imagefolder`, a data set
of the Hub, or scenes:SEED:COUNT for generated scenes.

    accelerate launch examples/finetune_captioning.py --model_name_or_path OFA --data DATA --output_dir OUTPUT \\
        --do_train --do_eval --do_predict --bf16

The batch of 64 captions is that of one process: with 4 of them pass --per_device_train_batch_size 16. An interrupted
run goes on from the last checkpoint in OUTPUT when the same command is given again. All arguments may stand in one
JSON file instead, the only argument then. Java is needed for the usual scores; --tokenizer plain --metrics bleu
rouge_l cider does without.

A second stage rewards sampled captions by their CIDEr (SCST):

    accelerate launch examples/finetune_captioning.py --model_name_or_path OUTPUT --data DATA --output_dir OUTPUT2 \\
        --do_train --do_eval --scst_samples 5 --label_smoothing_factor 0 --learning_rate 1e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 12 --dropout 0 --drop_path_rate 0
"""

from dataclasses import dataclass, field

from finetuning import DataArguments, RecipeArguments, keep_features, parse, read_rows, run_steps

from mue_hf import CaptionPairs, CiderDReward, MuEDataCollator, MuETrainer
from mue_hf.evaluation.processes import finish_processes
from mue_hf.evaluation.rows import row_fields
from mue_hf.metrics import caption_metrics, caption_scores


@dataclass
class CaptionDataArguments(DataArguments):
    """What is read, and how."""

    max_words: int = field(default=20, metadata={"help": "Words of a caption that are kept in training."})
    scst_references: int = field(default=5, metadata={"help": "References per image that SCST compares with."})
    metrics: list[str] = field(default_factory=lambda: ["bleu", "meteor", "rouge_l", "cider"])
    tokenizer: str = field(default="ptb", metadata={"help": "Of the metrics: ptb (needs Java) or plain."})


@dataclass
class CaptioningArguments(RecipeArguments):
    """`MuETrainingArguments` whose defaults are the paper's."""

    per_device_train_batch_size: int = 64
    label_smoothing_factor: float = 0.1


def main(argv: list[str] | None = None) -> None:
    """Trains (--do_train), scores captions of one split (--do_eval), writes those of another (--do_predict)."""
    origin, data, args = parse(__doc__, CaptionDataArguments, CaptioningArguments, argv)
    checkpoint = args.checkpoint_to_resume() if args.do_train else None
    scores = {"metrics": data.metrics, "tokenizer": data.tokenizer}
    if args.do_eval or args.do_predict:
        # a scorer that is missing is found before hours of training
        caption_scores(["a dog"], [["a dog"]], **scores)
    model, processor = origin.load()

    # Data
    rows = read_rows("captioning", data, args)
    fields = {part: row_fields(some) for part, some in rows.items() if part != "train" or not data.streaming}
    references = {part: [row["references"] for row in some] for part, some in fields.items()}
    rows = keep_features(model, processor, rows, data, args)
    reward = None
    collator = MuEDataCollator(processor, random_captions=data.streaming and args.do_train, max_words=data.max_words)
    if "train" in references and args.scst_samples:
        reward = CiderDReward([processor.encode_captions(captions) for captions in references["train"]])
        collator.captions_per_image = data.scst_references
    elif "train" in references:
        rows["train"] = CaptionPairs(rows["train"], references["train"])

    # Training
    def metrics(part: str):
        return caption_metrics(processor, references.get(part, []), **scores)

    trainer = MuETrainer(
        model,
        args,
        reward=reward,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        data_collator=collator,
        processing_class=processor,
        compute_metrics=metrics("eval"),
    )

    def describe(captions: list[str]):
        for row, caption in zip(fields["predict"], captions, strict=True):
            yield {"image_id": row["image_id"], "caption": caption}

    run_steps(trainer, rows, checkpoint, metrics, describe)


if __name__ == "__main__":
    main()
    finish_processes()
