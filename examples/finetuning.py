"""What finetune_captioning.py and finetune_entailment.py share: where training starts, which rows are read, and the
steps of a run. The paper's recipe for both tasks is in `RecipeArguments`."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from mue_hf import MuEForConditionalGeneration, MuEProcessor, MuETrainer, MuETrainingArguments, cache_trunk_features
from mue_hf.cli.options import setting
from mue_hf.evaluation.rows import load_rows
from mue_hf.files import write_whole
from mue_hf.metrics.generated import without_masks

logger = logging.getLogger(__name__)
Rows = dict[str, Any]


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

    def load(self) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
        """The model to train, in float32, and its processor."""
        model = MuEForConditionalGeneration.from_pretrained(
            self.model_name_or_path,
            dtype=torch.float32,
            modality_decomposition=self.modality_decomposition,
            dropout=self.dropout,
            encoder_drop_path_rate=self.drop_path_rate,
            decoder_drop_path_rate=self.drop_path_rate,
            attn_implementation=self.attn_implementation,
        )
        return model, MuEProcessor.from_pretrained(self.model_name_or_path)


@dataclass
class DataArguments:
    """What is read, and how."""

    data: str = field(metadata={"help": "File, folder, Hub id or scenes:SEED:COUNT."})
    eval_data: str | None = field(default=None, metadata={"help": "Default: that of training."})
    predict_data: str | None = field(default=None, metadata={"help": "Default: that of training."})
    train_split: str = field(default="train", metadata={"help": 'Which rows; "a+b" for both, "all" for every one.'})
    eval_split: str = "dev"
    predict_split: str = "test"
    max_train_samples: int | None = field(default=None, metadata={"help": "The first so many images or pairs alone."})
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    data_option: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=VALUE ... of `load_captioning` or `load_entailment`, e.g. image_root=photos."},
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

    def load(self, task: str, part: str, streaming: bool) -> Any:
        """The rows of "train", "eval" or "predict", checked."""
        source = getattr(self, f"{part}_data", None) or self.data
        options = dict(map(setting, self.data_option)) | {"skip_bad": self.skip_bad, "streaming": streaming}
        skipped: Counter = Counter()
        split, limit = getattr(self, f"{part}_split"), getattr(self, f"max_{part}_samples")
        rows = load_rows(task, source, split, limit=limit, skipped=skipped, **options)
        if skipped:
            logger.warning(f"{part}: left out {dict(skipped)}")
        return rows


@dataclass
class RecipeArguments(MuETrainingArguments):
    """`MuETrainingArguments` whose defaults are the paper's."""

    learning_rate: float = 3e-5
    num_train_epochs: float = 5.0
    warmup_steps: float = 0.06
    lr_scheduler_type: str = "polynomial"
    weight_decay: float = 0.01
    predict_with_generate: bool = True


def parse(description: str, data: type, training: type, argv: list[str] | None) -> tuple[Any, Any, Any]:
    """The arguments of model, data and training, from the command line or from the JSON file that it names."""
    parser = HfArgumentParser((ModelArguments, data, training), description=description)
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        parsed = parser.parse_json_file(argv[0])
    else:
        parsed = parser.parse_args_into_dataclasses(argv)
    args = parsed[-1]
    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING)
    args.check_scores()
    return parsed


def read_rows(task: str, data: DataArguments, args: MuETrainingArguments) -> Rows:
    """The rows that the run needs, by "train", "eval" and "predict"; those of training may be a shuffled stream."""
    wanted = {"train": args.do_train, "eval": args.do_eval, "predict": args.do_predict}
    with args.main_process_first(desc="reading the data", local=False):
        rows = {part: data.load(task, part, data.streaming and part == "train") for part in wanted if wanted[part]}
    if args.do_train and data.streaming:
        rows["train"] = rows["train"].shuffle(seed=args.seed)
    return rows


def keep_features(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    rows: Rows,
    data: DataArguments,
    args: MuETrainingArguments,
) -> Rows:
    """The rows with the features of a frozen trunk in place of images, which are computed once; streams stay."""
    if not args.freeze_trunk or (data.streaming and args.do_train):
        return rows
    folder = data.features_dir or Path(args.output_dir, "_features")
    with args.main_process_first(desc="trunk features", local=False):
        model.to(args.device)
        return {part: cache_trunk_features(model, processor, some, folder) for part, some in rows.items()}


def run_steps(
    trainer: MuETrainer,
    rows: Rows,
    checkpoint: str | None,
    metrics: Callable[[str], Callable[..., Mapping[str, Any]]],
    describe: Callable[[list[str]], Iterable[Mapping[str, Any]]],
) -> None:
    """
    Trains, scores one split and writes the predictions of another, as the arguments say.

    Args:
        trainer ([`MuETrainer`]): with the processor as its `processing_class`.
        rows (`dict`): see [`read_rows`].
        checkpoint (`str`, *optional*): where training goes on.
        metrics (`Callable`): "eval" or "predict" -> `compute_metrics` of its rows.
        describe (`Callable`): texts of the rows of "predict" -> what predictions.jsonl says of them.
    """
    args, processor = trainer.args, trainer.processing_class

    def report(part: str, values: dict[str, float]) -> None:
        trainer.log_metrics(part, values)
        trainer.save_metrics(part, values)

    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        report("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        trainer.compute_metrics = metrics("eval")
        report("eval", trainer.evaluate())
    if args.do_predict:
        trainer.compute_metrics = metrics("predict")
        output = trainer.predict(rows["predict"], metric_key_prefix="predict")
        report("predict", output.metrics)
        if trainer.is_world_process_zero():
            texts = processor.post_process_captions(without_masks(output.predictions, processor))
            lines = [json.dumps(line) + "\n" for line in describe(texts)]
            write_whole(Path(args.output_dir, "predictions.jsonl"), "".join(lines))
    if args.push_to_hub:
        trainer.push_to_hub()
