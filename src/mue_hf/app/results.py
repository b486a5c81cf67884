"""One photo, captioned or asked about a statement with exits and at full depth: depths, times and their picture."""

from collections.abc import Mapping
from functools import partial
from html import escape
from typing import Any

import torch
from PIL import Image

from ..inference.captioner import Captioner
from ..inference.depths import layers_skipped, read_depths
from ..inference.predict import run_task
from ..inference.timing import compare
from ..model.exit_options_mue import resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .explain import draw_signals, record_signals


def caption_photo(
    model: MuEForConditionalGeneration, processor: MuEProcessor, photo: Image.Image, exits: Mapping, repeats: int
) -> tuple[dict[str, Any], Any]:
    """The record of `mue-hf caption --json` for a photo, and the figure of [`draw_signals`]."""
    captioner = Captioner(model, processor, dict(exits), {}, repeats)
    (record,) = captioner.caption([photo])
    inputs = processor(images=photo).to(model.device, model.dtype)
    signals = record_signals(model, inputs, [token["id"] for token in record["tokens"]], exits)
    options = resolve_options(exits, {}, model.generation_config.to_dict(), model.config)
    return record, draw_signals(signals, options, captioner.flops.max_tokens)


def judge_statement(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    photo: Image.Image,
    hypothesis: str,
    exits: Mapping[str, Any],
    repeats: int,
) -> dict[str, Any]:
    """What a photo says about a statement with exits and at full depth: answer -> probability, depths, seconds."""
    inputs = processor(images=photo, task="entailment", hypothesis=hypothesis).to(model.device, model.dtype)
    answers = list(processor.entailment_answers.values())
    ids = processor.encode_answers(answers)
    ways = {"": exits, "full_depth_": {"exit_criterion": "never"}}
    calls = {way: partial(run_task, model, inputs, options, ids) for way, options in ways.items()}
    with torch.no_grad():
        outputs, seconds = compare(calls, repeats, model.device)
    facts: dict[str, Any] = {f"{way}seconds": seconds[way] for way in ways}
    for way, output in outputs.items():
        facts[f"{way}probabilities"] = dict(zip(answers, output.scores[0].exp().tolist(), strict=True))
    (depths,) = read_depths(outputs[""])
    return {
        **facts,
        "image_exit_layers": depths.image_exit_layers,
        "text_exit_layers": depths.text_exit_layers,
        "answer_exit_layers": list(depths.decoder_exit_layers),
        "layers_skipped": layers_skipped(model.config, depths),
    }


def show_figures(
    model: MuEForConditionalGeneration, record: Mapping[str, Any], exits: Mapping[str, Any], repeats: int
) -> str:
    """HTML of what was saved and measured, and on what."""
    shares = {"layers_skipped": "layers skipped", "flops_skipped": "FLOPs skipped"}
    shares["flops_skipped_without_trunk"] = "without the image trunk"
    tiles = {name: f"{record[share]:.0%}" for share, name in shares.items() if share in record}
    tiles["with exits"] = f"{1000 * record['seconds']:.0f} ms"
    tiles["at full depth"] = f"{1000 * record['full_depth_seconds']:.0f} ms"
    tiles["speed-up"] = f"{record['full_depth_seconds'] / record['seconds']:.2f}x"
    options = ", ".join(f"{name}={value!r}" for name, value in exits.items())
    note = (
        f"{options}. Times: medians of {repeats} runs in turns, trunk, encoder and decoder of one photo, measured now "
        f"({model.device}, {str(model.dtype).removeprefix('torch.')}, threads {torch.get_num_threads()})."
    )
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in tiles.items())
    return f'<div class="figures">{cells}</div><p class="note">{escape(note)}</p>'


__all__ = ["caption_photo", "judge_statement", "show_figures"]
