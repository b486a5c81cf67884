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

import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from mue_hf import (
    CaptionPairs,
    CiderDReward,
    MuEDataCollator,
    MuEForConditionalGeneration,
    MuEProcessor,
    MuETrainer,
    MuETrainingArguments,
    cache_trunk_features,
)
from mue_hf.cli.caption import setting
from mue_hf.evaluation.processes import finish_processes
from mue_hf.evaluation.rows import load_rows, row_fields
from mue_hf.files import write_whole
from mue_hf.metrics import caption_metrics, caption_scores
from mue_hf.metrics.generated import without_masks

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Where training starts from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub id, e.g. of `mue-hf convert`."})
    modality_decomposition: bool = field(
        default=True, metadata={"help": "Whether image and text have encoder streams of their own; OFA's is joint."}
    )
    dropout: float = 0.1
    drop_path_rate: float = field(default=0.1, metadata={"help": "Of encoder and decoder layers."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager or sdpa; default: transformers'."})


@dataclass
class DataArguments:
    """What is read, and how."""

    data: str = field(metadata={"help": "File, folder, Hub id or scenes:SEED:COUNT."})
    eval_data: str | None = field(default=None, metadata={"help": "Default: that of training."})
    predict_data: str | None = field(default=None, metadata={"help": "Default: that of training."})
    train_split: str = field(default="train", metadata={"help": 'Which rows; "a+b" for both, "all" for every one.'})
    eval_split: str = "dev"
    predict_split: str = "test"
    max_train_samples: int | None = field(default=None, metadata={"help": "The first so many images alone."})
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    data_option: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=VALUE ... of `load_captioning`, e.g. image_root=photos caption_column=text."},
    )
    skip_bad: bool = field(default=False, metadata={"help": "Whether bad rows are left out and counted."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Whether training rows are read when needed; an epoch then has one caption per image."},
    )
    features_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where a frozen trunk's features are kept, default: _features in output_dir. Other processes wait "
            "for the first one to compute them; raise --ddp_timeout for large data."
        },
    )
    max_words: int = field(default=20, metadata={"help": "Words of a caption that are kept in training."})
    scst_references: int = field(default=5, metadata={"help": "References per image that SCST compares with."})
    metrics: list[str] = field(default_factory=lambda: ["bleu", "meteor", "rouge_l", "cider"])
    tokenizer: str = field(default="ptb", metadata={"help": "Of the metrics: ptb (needs Java) or plain."})


@dataclass
class CaptioningArguments(MuETrainingArguments):
    """`MuETrainingArguments` whose defaults are the paper's."""

    learning_rate: float = 3e-5
    per_device_train_batch_size: int = 64
    num_train_epochs: float = 5.0
    warmup_steps: float = 0.06
    lr_scheduler_type: str = "polynomial"
    weight_decay: float = 0.01
    label_smoothing_factor: float = 0.1
    predict_with_generate: bool = True


def load(data: DataArguments, part: str, streaming: bool = False):
    """The rows of "train", "eval" or "predict", checked."""
    source = getattr(data, f"{part}_data", None) or data.data
    options = dict(map(setting, data.data_option)) | {"skip_bad": data.skip_bad, "streaming": streaming}
    skipped = Counter()
    split, limit = getattr(data, f"{part}_split"), getattr(data, f"max_{part}_samples")
    rows = load_rows("captioning", source, split, limit=limit, skipped=skipped, **options)
    if skipped:
        logger.warning(f"{part}: left out {dict(skipped)}")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Trains (--do_train), scores captions of one split (--do_eval), writes those of another (--do_predict)."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CaptioningArguments), description=__doc__)
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        origin, data, args = parser.parse_json_file(argv[0])
    else:
        origin, data, args = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING)
    args.check_scores()
    checkpoint = args.checkpoint_to_resume() if args.do_train else None
    if args.do_eval or args.do_predict:
        # a scorer that is missing is found before hours of training
        caption_scores(["a dog"], [["a dog"]], metrics=data.metrics, tokenizer=data.tokenizer)

    # Model
    processor = MuEProcessor.from_pretrained(origin.model_name_or_path)
    model = MuEForConditionalGeneration.from_pretrained(
        origin.model_name_or_path,
        dtype=torch.float32,
        modality_decomposition=origin.modality_decomposition,
        dropout=origin.dropout,
        encoder_drop_path_rate=origin.drop_path_rate,
        decoder_drop_path_rate=origin.drop_path_rate,
        attn_implementation=origin.attn_implementation,
    )

    # Data
    wanted = {"train": args.do_train, "eval": args.do_eval, "predict": args.do_predict}
    streaming = data.streaming and args.do_train
    with args.main_process_first(desc="reading the data", local=False):
        rows = {part: load(data, part, streaming and part == "train") for part in wanted if wanted[part]}
    fields = {part: row_fields(some) for part, some in rows.items() if not (streaming and part == "train")}
    references = {part: [row["references"] for row in some] for part, some in fields.items()}
    if args.freeze_trunk and not streaming:
        folder = data.features_dir or Path(args.output_dir, "_features")
        with args.main_process_first(desc="trunk features", local=False):
            model.to(args.device)
            rows = {part: cache_trunk_features(model, processor, some, folder) for part, some in rows.items()}
    reward = None
    collator = MuEDataCollator(processor, random_captions=streaming, max_words=data.max_words)
    if streaming:
        rows["train"] = rows["train"].shuffle(seed=args.seed)
    elif args.scst_samples and args.do_train:
        reward = CiderDReward([processor.encode_captions(captions) for captions in references["train"]])
        collator.captions_per_image = data.scst_references
    elif args.do_train:
        rows["train"] = CaptionPairs(rows["train"], references["train"])

    # Training
    trainer = MuETrainer(
        model,
        args,
        reward=reward,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        data_collator=collator,
        processing_class=processor,
        compute_metrics=caption_metrics(
            processor, references.get("eval", []), metrics=data.metrics, tokenizer=data.tokenizer
        ),
    )
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_predict:
        trainer.compute_metrics = caption_metrics(
            processor, references["predict"], metrics=data.metrics, tokenizer=data.tokenizer
        )
        output = trainer.predict(rows["predict"], metric_key_prefix="predict")
        trainer.log_metrics("predict", output.metrics)
        trainer.save_metrics("predict", output.metrics)
        if trainer.is_world_process_zero():
            captions = processor.post_process_captions(without_masks(output.predictions, processor))
            lines = [
                json.dumps({"image_id": row["image_id"], "caption": caption}) + "\n"
                for row, caption in zip(fields["predict"], captions, strict=True)
            ]
            write_whole(Path(args.output_dir, "predictions.jsonl"), "".join(lines))
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
    finish_processes()
