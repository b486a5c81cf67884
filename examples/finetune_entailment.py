# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Fine-tune a MuE checkpoint, such as a converted OFA, on visual entailment; the defaults are those of the MuE paper.

DATA is whatever `mue_hf.data.load_entailment` reads, such as SNLI-VE: a JSONL, JSON, CSV or parquet file, an
`imagefolder`, a data set of the Hub, or scenes:SEED:COUNT for generated scenes with eight statements each.

    accelerate launch examples/finetune_entailment.py --model_name_or_path OFA --data DATA --output_dir OUTPUT \\
        --do_train --do_eval --do_predict --bf16

The paper's prompt holds a caption of the image as the premise, where rows have one: say --no_use_premise to decide by
the image alone. Answers are scored as a closed set. The batch of 32 pairs is that of one process: with 4 of them pass
--per_device_train_batch_size 8. An interrupted run goes on from the last checkpoint in OUTPUT when the same command is
given again. All arguments may stand in one JSON file instead, the only argument then.
"""

from dataclasses import dataclass, field

from finetuning import DataArguments, RecipeArguments, keep_features, parse, read_rows, run_steps

from mue_hf import MuEDataCollator, MuETrainer
from mue_hf.evaluation.processes import finish_processes
from mue_hf.evaluation.rows import row_fields
from mue_hf.metrics import entailment_metrics


@dataclass
class PairDataArguments(DataArguments):
    """What is read, and how."""

    use_premise: bool = field(
        default=True, metadata={"help": "Whether the prompt holds the premise, if there is one."}
    )
    prompt_type: str = field(
        default="prev_output", metadata={"help": "What the decoder reads before the answer: prev_output or none."}
    )


@dataclass
class EntailmentArguments(RecipeArguments):
    """`MuETrainingArguments` whose defaults are the paper's."""

    per_device_train_batch_size: int = 32


def main(argv: list[str] | None = None) -> None:
    """Trains (--do_train), scores answers of one split (--do_eval), writes those of another (--do_predict)."""
    origin, data, args = parse(__doc__, PairDataArguments, EntailmentArguments, argv)
    checkpoint = args.checkpoint_to_resume() if args.do_train else None
    model, processor = origin.load()

    # Data
    rows = read_rows("entailment", data, args)
    fields = row_fields(rows["predict"]) if args.do_predict else []
    rows = keep_features(model, processor, rows, data, args)

    # Training
    trainer = MuETrainer(
        model,
        args,
        answers=processor.encode_answers(list(processor.entailment_answers.values())),
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("eval"),
        data_collator=MuEDataCollator(processor, use_premise=data.use_premise, prompt_type=data.prompt_type),
        processing_class=processor,
        compute_metrics=entailment_metrics(processor),
    )

    def describe(answers: list[str]):
        for row, answer in zip(fields, answers, strict=True):
            kept = {name: row.get(name) for name in ("image_id", "premise", "hypothesis", "label")}
            yield kept | {"answer": answer.strip()}

    run_steps(trainer, rows, checkpoint, lambda part: trainer.compute_metrics, describe)


if __name__ == "__main__":
    main()
    finish_processes()
