"""MuE's training against its parts and against smaller models, on one short equal schedule of generated scenes.

Every variant is trained by examples/train_scenes.py and measured as `mue-hf evaluate` does: the paper's recipe;
without the layer-wise loss; without decomposition (a joint encoder); models of two and three layers, which take as
many more steps as fit into the same time; the options of MuETrainer one by one, and together. As in the paper, they
fine-tune a model that is joint and was trained on its last layer alone. It has two layers, and grows to those of the
variant without a change of what it computes (where no variant has two layers, a start may have three):

    make runs/plain/relations/report.json REPRODUCED=runs/plain LAYERS=2 STAGE_ARGS="--joint --layer_weights 0 1"
    python benchmarks/compare_training.py --start_from runs/plain/relations --output_dir runs/compare

A variant gets a folder with its checkpoint, its points and `record.json`; what is finished is kept, so an interrupted
run goes on. `--table` and `--plot` say where the table and the plot of them go. Further arguments are those of
examples/train_scenes.py and hold for all variants.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor
from mue_hf.benchmarking.tables import markdown_table
from mue_hf.cli.evaluate import add_arguments, run
from mue_hf.cli.options import RenamedOption
from mue_hf.evaluation.depths import similarity_curves
from mue_hf.evaluation.plots import COLORS, label_ends, save_figure
from mue_hf.evaluation.rows import load_rows
from mue_hf.evaluation.signals import SignalRecorder, answer_tokens
from mue_hf.evaluation.store import read_records
from mue_hf.evaluation.tables import describe_environment
from mue_hf.files import write_whole
from mue_hf.inference.predict import predict

VARIANTS: dict[str, list[str]] = {
    "paper": [],
    "last-layer-loss": ["--layer_weights", "0", "0", "0", "0", "0", "1"],
    "joint-encoder": ["--joint"],
    "layers-2": ["--layers", "2"],
    "layers-3": ["--layers", "3"],
    "layer-weights": ["--layer_weights", "0.3", "0.4", "0.5", "0.7", "0.8", "1"],
    "self-distillation": ["--self_distillation", "1"],
    "random-exit-depth": ["--random_exit_depth"],
    "token-share": ["--intermediate_token_share", "0.4"],
    "depth-and-distillation": ["--random_exit_depth", "--self_distillation", "1"],
}
# They take the time of "paper", not its steps.
SMALLER = {"layers-2": 2, "layers-3": 3}
LAYERS = 6
TRAINING = """--use_cpu --native_bf16 --learning_rate 2e-3 --muon_learning_rate 6e-3 --warmup_steps 100
--weight_decay 0.01 --adam_beta2 0.98 --freeze_trunk --caption_share 0.1 --captions_per_image 1 --ema_decay 0.995
--per_device_train_batch_size 16 --per_device_eval_batch_size 64 --save_steps 200 --save_total_limit 1
--logging_steps 100 --report_to none""".split()
STAGES = {
    "captioning": ["--first_scene=500000", "--lr_scheduler_type=constant_with_warmup"],
    "entailment": ["--first_scene=1000000", "--lr_scheduler_type=cosine"],
}


def load_example() -> Any:
    """examples/train_scenes.py as a module; checkpoints name its classes, so that it must be found by its name."""
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module("train_scenes")


def train(example: Any, folder: Path, name: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `train_scenes.main` returned for the stages of a variant."""
    captioning = round(args.captioning_share * steps)
    reports, start = {}, args.start_from
    for stage, count in {"captioning": captioning, "entailment": steps - captioning}.items():
        if count:
            options = [*TRAINING, *STAGES[stage], *args.training, f"--layers={LAYERS}", *VARIANTS[name]]
            options.append(f"--start_from={start}")
            reports[stage] = run_stage(example, folder / stage, stage, count, options)
            start = folder / stage
    return reports


def run_stage(example: Any, output: Path, stage: str, steps: int, options: list[str]) -> dict[str, Any]:
    """The report of a stage, which goes on from its last checkpoint, or is not run at all if it is finished."""
    path = output / "report.json"
    if not path.exists():
        options = [*options, f"--stage={stage}", f"--output_dir={output}", f"--max_steps={steps}"]
        example.main(options)
    return json.loads(path.read_text(encoding="utf-8"))


def steps_in_equal_time(example: Any, folder: Path, name: str, args: argparse.Namespace) -> int:
    """How many steps of a smaller model take the time of `args.steps` of "paper", by runs in turns of two lengths,
    whose difference is without what comes before the first step; kept in the folder."""
    path = folder / "timing" / f"{name}.json"
    if not path.exists():
        seconds = {}
        for steps in (args.timing_steps, 2 * args.timing_steps):
            for one in ("paper", name):
                output = path.parent / f"{name}-{one}-{steps}"
                options = [f"--output_dir={output}", f"--max_steps={steps}", *TRAINING, *args.training]
                options += [f"--layers={LAYERS}", *VARIANTS[one], "--save_strategy", "no"]
                report = example.main([*options, f"--start_from={args.start_from}"])
                seconds[one] = report["seconds"] - seconds.get(one, 0.0)
        write_whole(path, json.dumps(seconds))
    seconds = json.loads(path.read_text(encoding="utf-8"))
    # differences of short runs are rough
    return max(args.steps, round(args.steps * seconds["paper"] / max(seconds[name], 1e-3)))


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The points of `mue-hf evaluate`, and the similarity curves on 50 scenes of the split dev."""
    checkpoint, points = folder / "entailment", folder / "points.jsonl"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--model", str(checkpoint), "--data", f"scenes:{args.test_seed}:{args.scenes}", "--output", str(points)]
    options += ["--sweep", "similarity", "--sweep", "fixed", "--thresholds-split", "dev", "--batch-size", "64"]
    run(parser.parse_args(["entailment", *options, "--time-rows", str(args.time_rows)]))
    model = MuEForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = MuEProcessor.from_pretrained(checkpoint)
    rows = load_rows("entailment", f"scenes:{args.test_seed}:50", "dev")
    with SignalRecorder(model, answer_tokens(processor)) as recorder:
        predict(model, processor, rows, "entailment", {"exit_criterion": "never"}, batch_size=64)
    return read_records(points), similarity_curves(recorder.signals)


def make_record(example: Any, folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures a variant, unless it is finished."""
    path = folder / name / "record.json"
    asked = {"steps": args.steps, "captioning_share": args.captioning_share, "training": [*TRAINING, *args.training]}
    asked |= {"start": str(args.start_from), "scenes": args.scenes, "test_seed": args.test_seed}
    if path.exists():
        text = path.read_text(encoding="utf-8")
        # names of version 0.1
        for old, new in {"telling_share": "captioning_share", "--told_share": "--caption_share"}.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        record = json.loads(text)
        if record["asked"] != asked:
            raise ValueError(f"`--output_dir` must hold runs of these options, but {path} is of {record['asked']}.")
        return record
    steps = steps_in_equal_time(example, folder, name, args) if name in SMALLER else args.steps
    reports = train(example, folder / name, name, steps, args)
    points, layers = measure(folder / name, args)
    kept = ("name", "criterion", "exits", "quality", "intervals", "identical", "depth", "layers_skipped", "flops")
    record = {
        "variant": name,
        "options": VARIANTS[name],
        "asked": asked,
        "steps": steps,
        "training_seconds": sum(report["seconds"] for report in reports.values()),
        "bf16": reports["entailment"]["bf16"],
        "dev_accuracy": reports["entailment"]["accuracy"],
        "rows": points[0]["rows"],
        "layers": points[0]["layers"],
        "by_kind": points[0]["by_kind"],
        "similarity": layers,
        "environment": points[0]["environment"],
        "points": [{key: point[key] for key in (*kept, "time")} for point in points],
    }
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return record


def most_skipped(record: dict[str, Any], share: float = 0.99) -> dict[str, Any]:
    """The point of similarity (or full depth) that skips most layers at `share` of the accuracy at full depth. Its
    thresholds come from the split dev; that it is this point is known from the test split alone."""
    least = share * record["points"][0]["quality"]["accuracy"]
    points = [one for one in record["points"] if one["criterion"].startswith(("full", "similarity"))]
    return max(
        (one for one in points if one["quality"]["accuracy"] >= least), key=lambda one: one["layers_skipped"]["mean"]
    )


def best_at(record: dict[str, Any], criterion: str, skipped: float = 0.5) -> str:
    """The best accuracy of a criterion that skips at least that share of the layers."""
    points = [one for one in record["points"] if one["criterion"].startswith(criterion)]
    fitting = [one["quality"]["accuracy"] for one in points if one["layers_skipped"]["mean"] >= skipped]
    return f"{max(fitting):.3f}" if fitting else "-"


def mean_cosine(record: dict[str, Any], stream: str) -> str:
    """How little layers change a stream: the mean cosine over layers but the first, whose input is an embedding."""
    cosines = record["similarity"].get(stream, {"mean": []})["mean"][1:]
    return f"{sum(cosines) / len(cosines):.3f}" if cosines else "-"


def make_table(records: list[dict[str, Any]]) -> str:
    """The records as a table in markdown; accuracies with 95 % intervals by picture."""
    kinds = list(records[0]["by_kind"])
    machine, versions = describe_environment(records[0])
    precision = "bfloat16" if records[0]["bf16"] else "float32"
    rows = f"{records[0]['rows']} test statements about {records[0]['asked']['scenes']} scenes"
    lines = markdown_table([table_row(record, kinds) for record in records])
    lines += ["", f"{rows}; trained in {precision}; {machine}; {versions}."]
    return "\n".join(lines) + "\n"


def table_row(record: dict[str, Any], kinds: list[str]) -> dict[str, str]:
    """A variant, by column."""
    full, best = record["points"][0], most_skipped(record)
    image = "image" if "image" in record["similarity"] else "encoder"
    half = max(1, record["layers"]["decoder"] // 2)
    accuracies = {one["name"]: one["quality"]["accuracy"] for one in record["points"]}
    by_kind = {kind: one["accuracy"] for kind, one in record["by_kind"].items()}
    return {
        "variant": record["variant"],
        "layers": "{encoder}+{decoder}".format(**record["layers"]),
        "steps": str(record["steps"]),
        "accuracy": "{:.3f} [{:.3f}, {:.3f}]".format(full["quality"]["accuracy"], *full["intervals"]["accuracy"]),
        **{kind: f"{by_kind[kind]:.3f}" if kind in by_kind else "-" for kind in kinds},
        "R at 99 %": f"{best['layers_skipped']['mean']:.1%}",
        "identical there": f"{best['identical']:.3f}",
        "R >= 50 %: similarity": best_at(record, "similarity"),
        "R >= 50 %: fixed": best_at(record, "fixed"),
        "one image layer": f"{accuracies[f'fixed {image} 1']:.3f}",
        "half of the decoder": f"{accuracies[f'fixed decoder {half}']:.3f}",
        "cosine of image layers": mean_cosine(record, image),
        "of decoder layers": mean_cosine(record, "decoder"),
    }


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against layers skipped, up to six variants in a panel: similarity as lines, with thresholds per layer
    dotted, fixed depths dashed."""
    from matplotlib.figure import Figure

    panels = [records[start : start + len(COLORS)] for start in range(0, len(records), len(COLORS))]
    figure = Figure(figsize=(9, 5 * len(panels)), layout="constrained")
    styles = {"x--": ("full", "fixed"), ".:": ("full", "similarity per layer"), "o-": ("full", "similarity")}
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        axes.set(xlabel="layers skipped (R), %", ylabel="accuracy", title="Variants of training")
        axes.grid(alpha=0.3)
        ends = []
        for color, record in zip(COLORS, panel, strict=False):
            for style, criteria in styles.items():
                points = [one for one in record["points"] if one["criterion"] in criteria]
                pairs = sorted((100 * one["layers_skipped"]["mean"], one["quality"]["accuracy"]) for one in points)
                axes.plot(*zip(*pairs, strict=True), style, color=color, markersize=4)
            ends.append((record["variant"], *pairs[-1], color))
        label_ends(axes, ends)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Makes the records that are missing, then the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="default: table.md in the output folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="default: accuracy.png in the output folder")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--start_from", type=Path, required=True, metavar="FOLDER", help="what to fine-tune")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a variant (1000)")
    shares = {"dest": "captioning_share", "type": float, "default": 0.5}
    parser.add_argument(
        "--captioning_share", "--captioning-share", help="share of them for captioning (0.5)", **shares
    )
    parser.add_argument("--telling_share", action=RenamedOption, help=argparse.SUPPRESS, **shares)
    parser.add_argument("--timing_steps", type=int, default=30, help="steps by which smaller models are timed (30)")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes of eight statements (200)")
    parser.add_argument("--test_seed", type=int, default=0, help="of the test scenes (0)")
    parser.add_argument("--time_rows", type=int, default=0, help="statements to time (0)")
    args, args.training = parser.parse_known_args(argv)
    if not 0 <= args.captioning_share < 1 or round(args.captioning_share * args.steps) >= args.steps:
        parser.error(f"--captioning_share must leave steps for entailment, got {args.captioning_share}.")
    smallest = min(SMALLER.get(name, LAYERS) for name in args.variants)
    if (layers := MuEConfig.from_pretrained(args.start_from).decoder_layers) > smallest:
        parser.error(f"--start_from must have at most {smallest} layers, as the smallest variant, got {layers}.")
    example = load_example()
    records = [make_record(example, args.output_dir, name, args) for name in args.variants]
    table = make_table(records)
    write_whole(args.table or args.output_dir / "table.md", table)
    draw(records, args.plot or args.output_dir / "accuracy.png")
    print(table)


if __name__ == "__main__":
    main()
