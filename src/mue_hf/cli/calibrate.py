"""`mue-hf calibrate`: finds exit thresholds that keep a budget and writes them into the checkpoint as a preset."""

import argparse
import json
from dataclasses import replace
from inspect import signature
from typing import Any

from tqdm import tqdm

from ..calibration import Calibration, calibrate, check_preset, write_preset
from ..calibration.bounds import METHODS, rounded_up
from ..calibration.fit import COVERAGE
from ..calibration.goal import GUARANTEES, OBJECTIVES, RISKS, SHARED_OPTIONS, calibrated_criteria
from ..data.features import cache_trunk_features
from ..evaluation.rows import describe_rows, load_rows
from ..inference.loading import check_not_replaced
from ..inference.predict import TASKS
from ..model.criteria_mue import CRITERIA, STREAMS
from ..model.exit_options_mue import KV_POLICIES
from .evaluate import add_data_arguments
from .options import (
    RenamedOption,
    add_decoding_arguments,
    add_device_arguments,
    add_engine_argument,
    add_generate_argument,
    at_least,
    decoding_options,
    load_model,
)

EPILOG = """examples:
  mue-hf calibrate my-checkpoint --task captioning --data captions.jsonl --budget 0.05 --preset balanced
  mue-hf calibrate my-checkpoint --task entailment --data scenes:0:2000 --compute 0.6 --preset fast
  mue-hf calibrate my-checkpoint --task captioning --data captions.jsonl --criterion agreement --kv exact

With --budget, the preset changes at most that share of the outputs (or loses at most that much of the metric) on
average over images like these, with confidence 1 - delta; nothing is written if no setting can be certified. With
--guarantee expectation, the mean over calibrations keeps it, and nothing is said of one preset with confidence. With
--compute, it is the setting of the least expected loss within that share of full depth, and its bound is reported.
Exit codes: 0 a preset was found, 1 none could be certified, 2 bad input or too few images for the budget."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf calibrate` takes."""
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="CKPT", help="checkpoint folder; its generation_config.json gets the preset")
    parser.add_argument("--preset", default="calibrated", metavar="NAME", help="name of the preset (calibrated)")
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")
    data = add_data_arguments(parser, "dev", "; time is then without the trunk", fewest=2)
    data.add_argument("--task", choices=TASKS, required=True)
    share = "share of the images in the search split (0.3)"
    data.add_argument("--search-share", type=float, default=0.3, metavar="S", help=share)
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits (0)")
    goal = parser.add_argument_group("goal")
    either = goal.add_mutually_exclusive_group()
    either.add_argument("--budget", type=float, metavar="R", help="allowed mean loss (default: 0.05)")
    either.add_argument("--compute", type=float, metavar="C", help="allowed cost as a share of full depth")
    goal.add_argument("--delta", type=float, default=0.05, metavar="D", help="1 - confidence (0.05)")
    guarantee = "confidence: the preset keeps the budget, with probability 1 - delta (default); expectation: the mean "
    guarantee += "over calibrations on images like these does, by conformal risk control, from a third of the images"
    goal.add_argument("--guarantee", choices=GUARANTEES, default="confidence", help=guarantee)
    goal.add_argument("--risk", choices=RISKS, default="disagreement", help="changed outputs, or loss of the metric")
    goal.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="flops",
        help="what is to be saved; calls: layer calls of a row alone (flops)",
    )
    goal.add_argument("--method", choices=METHODS, default="hoeffding-bentkus", help="of the test (hoeffding-bentkus)")
    settings = parser.add_argument_group("settings to try")
    criteria: dict[str, Any] = {"choices": calibrated_criteria(), "default": ["similarity"]}
    alone = ", ".join(name for name in criteria["choices"] if not CRITERIA[name].in_encoder)
    known = f"to choose from: {', '.join(criteria['choices'])} (similarity)"
    known += f"; with {alone} encoder streams exit by similarity"
    settings.add_argument("--criterion", dest="criteria", nargs="+", **criteria, metavar="NAME", help=known)
    held = "streams that may exit, others run whole, e.g. decoder (default: all of the model)"
    settings.add_argument("--streams", nargs="+", choices=STREAMS, metavar="NAME", help=held)
    settings.add_argument("--per-layer", action="store_true", help="a threshold for each layer, of similarity")
    depths = "encoder streams may stop at fixed depths too, whatever the decoder's criterion"
    settings.add_argument("--encoder-depths", action="store_true", help=depths)
    decays: dict[str, Any] = {"dest": "betas", "type": float, "nargs": "+", "default": [1.0]}
    settings.add_argument("--beta", **decays, metavar="B", help="decays of the decoder's threshold (1)")
    count: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    settings.add_argument("--num-thresholds", **count, default=5, help="candidate thresholds per stream (5)")
    settings.add_argument("--levels", dest="num_thresholds", action=RenamedOption, **count, help=argparse.SUPPRESS)
    settings.add_argument("--candidates", **count, default=8, help="combinations to test (8)")
    tokens = f"tokens that criteria look at in captions, or the share of outputs that they cover ({COVERAGE})"
    settings.add_argument("--exit-candidates", type=_number_or_share, metavar="N", help=tokens)
    kv = f"keys and values of skipped layers: {', '.join(KV_POLICIES)} (project); the preset has what was certified"
    settings.add_argument("--kv", choices=KV_POLICIES, metavar="POLICY", help=kv)
    runs = parser.add_argument_group("runs")
    add_device_arguments(runs)
    add_engine_argument(runs)
    runs.add_argument("--batch-size", **count, default=16, help="rows per call (16)")
    add_decoding_arguments(runs)
    kept = "folder where outputs are kept: the same command goes on where it was interrupted (runs/calibration)"
    runs.add_argument("--runs", dest="folder", default="runs/calibration", metavar="DIR", help=kept)
    shared = ", ".join(SHARED_OPTIONS)
    add_generate_argument(runs, f"any other option of generate, or one of {shared}; may be repeated")


def _number_or_share(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _show_fit(report: dict[str, Any]) -> list[str]:
    """How reliable the probabilities of criterion "agreement" are, as lines."""
    count, coverage = report["candidates"], report["coverage"]
    looked = "the answers' tokens" if count is None else f"{count} tokens"
    held = "" if coverage is None else f", which hold {coverage:.1%} of new full-depth outputs"
    names = list(report["layers"][0]["auc"]) if report["layers"] else []
    lines = [f"agreement: fitted on {report['decisions']} decisions over {looked}{held}; on the other half of them:"]
    lines.append("  layer  right  Brier  area under ROC: " + "  ".join(names))
    for one in report["layers"]:
        areas = (one["auc"][name] for name in names)
        shown = "  ".join("-" if area is None else f"{area:.3f}" for area in areas)
        lines.append(f"  {one['layer']:5}  {one['right']:5.3f}  {one['brier']['agreement']:5.3f}  {shown}")
    lines.append("  probability    expected  right  decisions")
    for one in report["bins"]:
        edges = f"{one['from']:5.3f} - {one['to']:5.3f}"
        lines.append(f"  {edges}  {one['expected']:8.3f}  {one['right']:5.3f}  {one['count']:9}")
    return lines


def _show(calibration: Calibration, name: str, written: bool) -> str:
    lines = _show_fit(calibration.report) if calibration.report else []
    lines += ["   loss  bound  p-value  FLOPs   time  calls  options"]
    for one in calibration.tested:
        pvalue = "-" if one.pvalue is None else f"{one.pvalue:.3g}"
        cost = f"{one.flops:5.0%}  {one.seconds:5.0%}  {one.calls:5.0%}"
        options = {name: value for name, value in one.options.items() if name != "exit_fit"}
        lines.append(f"  {one.loss:5.3f}  {one.bound:5.3f}  {pvalue:>7}  {cost}  {json.dumps(options)}")
    preset = calibration.preset
    if preset is None:
        lines.append("No setting could be certified: already the safest one lost too much. Nothing was written.")
        return "\n".join(lines)
    promise = rounded_up(preset.get("budget", preset["bound"]))
    surely = (
        "in expectation over calibrations" if "delta" not in preset else f"with confidence {1 - preset['delta']:g}"
    )
    lines.append(
        f"{name}: mean loss ({preset['risk']}) of at most {promise:.3g} {surely}, from "
        f"{preset['n']} images; {preset['flops']:.0%} of full depth's FLOPs, {preset['seconds']:.0%} of its time, "
        f"{preset['calls']:.0%} of its layer calls."
    )
    lines.append(f"Written to generation_config.json as {name!r}." if written else "Nothing was written.")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Calibrates and writes the preset; the exit code is 0, or 1 if nothing could be certified."""
    check_not_replaced(args.model)
    check_preset(args.model, args.preset)
    rows = load_rows(args.task, args.data, args.split, limit=args.limit, **dict(args.data_options))
    data = describe_rows(rows)
    model, processor = load_model(args)
    if args.features is not None:
        # In the model's dtype, so that nothing changes.
        data = replace(data, rows=cache_trunk_features(model, processor, rows, args.features, dtype=model.dtype))
    same = {name: value for name, value in vars(args).items() if name in signature(calibrate).parameters}
    same |= {"model": model, "processor": processor, "data": data}
    if args.budget is None and args.compute is None:
        same["budget"] = 0.05
    kv = {} if args.kv is None else {"exit_kv": args.kv}
    calibration = calibrate(**same, options=dict(args.generate) | kv | decoding_options(args))
    preset, written = calibration.preset, False
    if preset is not None and not args.dry_run:
        write_preset(args.model, args.preset, preset, calibration.exit_candidates)
        written = True
    tqdm.write(_show(calibration, args.preset, written))
    return 0 if preset is not None else 1


__all__ = ["add_arguments", "run"]
