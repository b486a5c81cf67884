"""`mue-hf app`: a page that captions a photo, or judges a statement about it, and shows where and why layers stop."""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from ..cli.options import DEFAULT_PRESET, add_model_arguments, at_least, load_model
from ..inference.captioner import Captioner
from ..inference.depths import layers_skipped, read_depths
from ..inference.timing import compare
from ..model.exit_options_mue import SHIPPED_PRESETS, ExitOptions, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor, load_image
from .explain import depth_map, draw_signals, record_signals

PHOTOS = Path("examples/photos")
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
FULL_DEPTH = "full depth"
# Greatest value and step. At 1 a threshold is never passed, and beta means no decay.
SLIDERS = {
    "image_exit_threshold": (1.0, 0.001),
    "text_exit_threshold": (1.0, 0.001),
    "encoder_exit_threshold": (1.0, 0.001),
    "decoder_exit_threshold": (1.0, 0.001),
    "exit_decay_beta": (1.0, 0.01),
    "exit_decay_tau": (5.0, 0.05),
}
ABOUT = """# Where does it stop?
The image and the text each leave the encoder, and every token leaves the decoder, when layers hardly change them any
more ([MuE](https://arxiv.org/abs/2211.11152)). A layer that is shown as skipped was not run."""
SLIDER_HELP = """A threshold of 1 never lets go; a lower one lets go earlier. Where a preset has a threshold per layer,
the slider stands at their median. What you move replaces that part of the preset, in all layers."""
DEPTH_HELP = "Layers that ran, and their number. The image and the text are encoded once, each token is decoded."
CURVE_HELP = """How alike the input and the output of each layer are, on an axis that is stretched towards 1. A stream
or token leaves at the dot, after the first layer above its threshold (red, at the lower edge if far below; for tokens
solid at the first and dotted at the last). Grey: what the other layers would have said."""
CSS = """
.depths { display: block; overflow-x: auto; margin: 0 !important; }
.depths, .depths * { border: 0 !important; }
.depths td, .depths th { padding: 1px 6px !important; text-align: center; font-size: 13px; font-weight: normal; }
.depths tbody td { min-width: 44px; height: 16px; background-clip: content-box; padding: 1px !important; }
.depths th, .depths tfoot tr:first-child td, .note { opacity: 0.7; }
.depths th, .note, .note * { font-size: 12px; }
.figures { display: flex; flex-wrap: wrap; gap: 8px 32px; font-size: 13px; margin-top: 8px; }
.figures b { display: block; font-size: 22px; }
"""
EXAMPLE = """example:
  mue-hf app
  mue-hf app --model path/to/checkpoint --photos path/to/photos --port 8000

Serves a page at http://127.0.0.1:7860 until it is interrupted; --host 0.0.0.0 lets other machines in, --share asks
Gradio for a public address. One photo is worked on at a time, so that times are those of the model alone.
Needs the extra app: pip install 'mue-hf[app]'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf app` takes."""
    parser.epilog = EXAMPLE
    add_model_arguments(parser)
    parser.add_argument("--photos", metavar="DIR", help=f"photos to pick from; default: {PHOTOS}, where it exists")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="timed runs each (default: 3)")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=at_least(1), metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also at a public address, through Gradio's servers")


def require_extra() -> None:
    """Raises an ImportError that says what to install where a package of the page is missing."""
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"The page needs {' and '.join(missing)}, not installed here: pip install 'mue-hf[app]'")


def find_photos(folder: str | Path | None) -> list[Path]:
    """The images in a folder; without one those of the repository, and none outside of it.

    Raises:
        ValueError: if a folder is named and holds no image.
    """
    found = sorted(path for path in Path(folder or PHOTOS).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if folder is not None and not found:
        raise ValueError(f"`--photos` must be a folder with images ({', '.join(IMAGE_SUFFIXES)}), got {folder}.")
    return found


def resolved_preset(model: MuEForConditionalGeneration, preset: str) -> ExitOptions:
    """The options of a preset, or of `FULL_DEPTH`."""
    call = {"exit_criterion": "never"} if preset == FULL_DEPTH else {"exit_preset": preset}
    return resolve_options(call, {}, model.generation_config.to_dict(), model.config)


def preset_names(model: MuEForConditionalGeneration) -> list[str]:
    """`FULL_DEPTH`, the presets of the checkpoint, and the shipped ones that its encoder can follow."""
    own = getattr(model.generation_config, "exit_presets", None) or {}
    fitting = []
    for name in dict.fromkeys([*own, *SHIPPED_PRESETS]):
        try:
            resolved_preset(model, name)
        except ValueError:
            continue
        fitting.append(name)
    return [FULL_DEPTH, *fitting]


def slider_values(model: MuEForConditionalGeneration, preset: str) -> dict[str, float]:
    """Where the sliders stand for a preset, in their steps: option -> value, for the options of this model."""
    options = resolved_preset(model, preset)
    other_mode = ("encoder",) if model.config.modality_decomposition else ("image", "text")
    values = {}
    for name, (greatest, step) in SLIDERS.items():
        if name.startswith(other_mode):
            continue
        value = getattr(options, name)
        if isinstance(value, tuple):
            value = median([x for x in value if x is not None] or [1.0])
        value = 1.0 if value is None else min(max(value, 0.0), greatest)
        values[name] = round(round(value / step) * step, 3)
    return values


def exit_choice(model: MuEForConditionalGeneration, preset: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The exit options of `generate`: the preset's, but for sliders that do not stand where it puts them."""
    shown = slider_values(model, preset)
    moved = {name: float(values[name]) for name in shown if not math.isclose(values[name], shown[name], abs_tol=1e-6)}
    if preset != FULL_DEPTH:
        return {"exit_preset": preset} | moved
    # All sliders, so that no option saved with the checkpoint takes part.
    return {"exit_criterion": "similarity"} | shown | moved if moved else {"exit_criterion": "never"}


def caption_photo(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    photo: Image.Image,
    exits: Mapping[str, Any],
    repeats: int,
) -> tuple[dict[str, Any], Any]:
    """The record of `mue-hf caption --json` for a photo, and the figure of [`draw_signals`].

    Raises:
        ValueError: for a photo that cannot be used, and options that contradict each other.
    """
    captioner = Captioner(model, processor, exits, {}, repeats)
    (record,) = captioner.caption([photo])
    inputs = processor(images=photo).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
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
    """What a photo says about a statement: answer -> probability with exits and at full depth, depths, median seconds.

    Raises:
        ValueError: for a photo or statement that cannot be used, and options that contradict each other.
    """
    inputs = processor(images=photo, task="entailment", hypothesis=hypothesis).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    answers = list(processor.entailment_answers.values())
    score = partial(model.score_answers, processor.encode_answers(answers), **inputs, return_dict=True)
    ways = {"exits": partial(score, **exits), "full": partial(score, exit_criterion="never")}
    with torch.no_grad():
        outputs, seconds = compare(ways, repeats, model.device)
    probabilities = {
        way: dict(zip(answers, output.scores[0].exp().tolist(), strict=True)) for way, output in outputs.items()
    }
    (depths,) = read_depths(outputs["exits"])
    return {
        "image_exit_layers": depths.image_exit_layers,
        "text_exit_layers": depths.text_exit_layers,
        "probabilities": probabilities["exits"],
        "full_depth_probabilities": probabilities["full"],
        "answer_exit_layers": list(depths.decoder_exit_layers),
        "layers_skipped": layers_skipped(model.config, depths),
        "seconds": seconds["exits"],
        "full_depth_seconds": seconds["full"],
    }


def show_figures(
    model: MuEForConditionalGeneration, record: Mapping[str, Any], exits: Mapping[str, Any], repeats: int
) -> str:
    """HTML of what was saved and measured, and on what."""
    tiles = {"layers skipped": f"{record['layers_skipped']:.0%}"}
    if "flops_skipped" in record:
        tiles["FLOPs skipped"] = f"{record['flops_skipped']:.0%}"
        tiles["without the image trunk"] = f"{record['flops_skipped_without_trunk']:.0%}"
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


def build_page(
    model: MuEForConditionalGeneration, processor: MuEProcessor, photos: Sequence[str | Path] = (), repeats: int = 3
) -> Any:
    """
    The page, to be shown by [`serve`].

    Args:
        model ([`MuEForConditionalGeneration`]): on its device, in evaluation mode.
        processor ([`MuEProcessor`]): that of the model.
        photos (sequence of paths, *optional*): some to pick from.
        repeats (`int`, *optional*, defaults to 3): timed runs of each way.

    Returns:
        `gradio.Blocks`

    Raises:
        ImportError: without the extra `app`.
    """
    require_extra()
    import gradio as gr

    presets = preset_names(model)
    first = DEFAULT_PRESET if DEFAULT_PRESET in presets else FULL_DEPTH
    config = model.config

    def streams(record: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        return [(name, record[f"{name}_exit_layers"], config.encoder_layers) for name in ("image", "text")]

    def caption(photo: Image.Image, exits: dict[str, Any]) -> list[Any]:
        record, figure = caption_photo(model, processor, photo, exits, repeats)
        tokens = [(token["text"].strip(), token["layers"], config.decoder_layers) for token in record["tokens"]]
        return [
            record["caption"],
            record["full_depth_caption"],
            show_figures(model, record, exits, repeats),
            depth_map(streams(record) + tokens),
            figure,
        ]

    def judge(photo: Image.Image, hypothesis: str, exits: dict[str, Any]) -> list[Any]:
        record = judge_statement(model, processor, photo, hypothesis, exits, repeats)
        answers = [("answer", depth, config.decoder_layers) for depth in record["answer_exit_layers"]]
        return [
            record["probabilities"],
            record["full_depth_probabilities"],
            show_figures(model, record, exits, repeats),
            depth_map(streams(record) + answers),
        ]

    # Photos of visitors are deleted within hours.
    with gr.Blocks(title="mue_hf", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT)
        tab = gr.State("caption")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                photo = gr.Image(
                    label="Photo", type="pil", image_mode=None, sources=["upload", "clipboard"], height=280
                )
                if photos:
                    gr.Examples([[str(path)] for path in photos], photo, label="or pick one", elem_id="photos")
                preset = gr.Dropdown(presets, value=first, label="Preset")
                sliders = {}
                for name, value in slider_values(model, first).items():
                    greatest, step = SLIDERS[name]
                    sliders[name] = gr.Slider(0, greatest, value, step=step, label=name, elem_id=name, buttons=[])
                gr.Markdown(SLIDER_HELP, elem_classes="note")
            with gr.Column(scale=5, min_width=480), gr.Tabs():
                with gr.Tab("Caption") as caption_tab:
                    with gr.Row():
                        captions = [
                            gr.Textbox(label=label, elem_id=name, placeholder="Pick a photo, or upload one.")
                            for label, name in (("With exits", "caption"), ("At full depth", "full_caption"))
                        ]
                    shown = [*captions, gr.HTML(elem_id="figures"), gr.HTML(elem_id="depths")]
                    gr.Markdown(DEPTH_HELP, elem_classes="note")
                    shown.append(gr.Plot(show_label=False, elem_id="curves", format="png"))
                    gr.Markdown(CURVE_HELP, elem_classes="note")
                with gr.Tab("Entailment") as entailment_tab:
                    hypothesis = gr.Textbox(
                        label="Statement", placeholder="a cat is looking up", submit_btn="Judge", elem_id="hypothesis"
                    )
                    with gr.Row():
                        labels = [gr.Label(label=label) for label in ("With exits", "At full depth")]
                    judged = [*labels, gr.HTML(elem_id="answer_figures"), gr.HTML(elem_id="answer_depths")]

        def refresh(tab: str, photo: Any, hypothesis: str, preset: str, *values: float) -> Any:
            if photo is None or (tab == "entailment" and not (hypothesis or "").strip()):
                return gr.skip()
            try:
                exits = exit_choice(model, preset, dict(zip(sliders, values, strict=True)))
                picture = load_image(photo)
                if tab == "entailment":
                    return dict(zip(judged, judge(picture, hypothesis, exits), strict=True))
                return dict(zip(shown, caption(picture, exits), strict=True))
            except (OSError, ValueError) as error:
                raise gr.Error(str(error)) from error

        work = {
            "fn": refresh,
            "inputs": [tab, photo, hypothesis, preset, *sliders.values()],
            "outputs": [*shown, *judged],
            # Of the events that wait while one is worked on, the last one counts.
            "trigger_mode": "always_last",
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",
            "api_visibility": "private",
        }
        gr.on([photo.change, hypothesis.submit, *(slider.input for slider in sliders.values())], **work)
        preset.input(
            lambda name: list(slider_values(model, name).values()),
            preset,
            list(sliders.values()),
            api_visibility="private",
        ).then(**work)
        for name, selected in (("caption", caption_tab), ("entailment", entailment_tab)):
            selected.select(partial(str, name), None, tab, api_visibility="private").then(**work)
    return page


def serve(page: Any, **options: Any) -> Any:
    """
    Shows a page until it is interrupted.

    Args:
        page (`gradio.Blocks`): of [`build_page`].
        options: of `gradio.Blocks.launch`, such as `server_name`, `server_port`, `share`.

    Raises:
        OSError: if the port is taken.
    """
    from gradio.themes import Default

    # Nothing is fetched from elsewhere, and nothing is kept in the browser.
    theme = Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    settings = {"ssr_mode": False, "run_history": False, "footer_links": ["gradio"], "max_file_size": "32mb"}
    return page.launch(theme=theme, css=CSS, show_error=True, **settings | options)


def run(args: argparse.Namespace) -> int:
    """Serves the page.

    Returns:
        `int`: 0, once it is interrupted.
    """
    require_extra()
    photos = find_photos(args.photos)
    page = build_page(*load_model(args), photos, args.repeats)
    serve(page, server_name=args.host, server_port=args.port, share=args.share)
    return 0


__all__ = ["add_arguments", "build_page", "find_photos", "run", "serve"]
