"""The page of `mue-hf app`: captions a photo, or judges a statement about it, and shows where and why layers stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..inference.loading import DEFAULT_PRESET
from ..model.images_mue import load_image
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .explain import depth_map
from .results import caption_photo, judge_statement, show_figures
from .settings import FULL_DEPTH, SLIDERS, exit_choice, preset_names, slider_values

PHOTOS = Path("examples/photos")
PHOTO_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
WAYS = ("With exits", "At full depth")
ABOUT = """# Where does it stop?
The image and the text each exit the encoder, and every token exits the decoder, when layers hardly change them any
more ([MuE](https://arxiv.org/abs/2211.11152)). A layer that is shown as skipped was not run."""
SLIDER_HELP = """At a threshold of 1 nothing exits early; a lower one lets it exit earlier. Where a preset has a
threshold per layer, the slider stands at their median. What you move replaces that part of the preset, in all layers.
"""
DEPTH_HELP = "Layers that ran, and their number. The image and the text are encoded once, each token is decoded."
CURVE_HELP = """How alike the input and the output of each layer are, on an axis that is stretched towards 1. A stream
or token exits at the dot, after the first layer above its threshold (red, at the lower edge if far below; for tokens
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


def require_extra() -> None:
    """Raises an ImportError that says what to install where a package of the page is missing."""
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"The page needs {' and '.join(missing)}, not installed here: pip install 'mue-hf[app]'")


def find_photos(folder: str | Path | None) -> list[Path]:
    """The images in a folder, a ValueError if there are none; without one those of the repository, where it exists."""
    found = sorted(path for path in Path(folder or PHOTOS).glob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if folder is not None and not found:
        raise ValueError(f"`--photos` must be a folder with images ({', '.join(PHOTO_SUFFIXES)}), got {folder}.")
    return found


def build_page(
    model: MuEForConditionalGeneration, processor: MuEProcessor, photos: Sequence[str | Path] = (), repeats: int = 3
) -> Any:
    """The page, a `gradio.Blocks` to be shown by [`serve`].

    Args:
        model, processor: the model on its device, in evaluation mode.
        photos (sequence of paths, *optional*): some to pick from.
        repeats (`int`, *optional*, defaults to 3): timed runs of each way.

    Raises:
        ImportError: without the extra `app`.
    """
    require_extra()
    import gradio as gr

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
                preset, sliders = _exit_inputs(model)
            with gr.Column(scale=5, min_width=480), gr.Tabs():
                with gr.Tab("Caption") as caption_tab:
                    captioned = _caption_outputs()
                with gr.Tab("Entailment") as entailment_tab:
                    hypothesis, judged = _entailment_outputs()
        places, private = list(sliders.values()), {"api_visibility": "private"}
        work = {
            "fn": _Worker(model, processor, repeats, list(sliders), captioned, judged).refresh,
            "inputs": [tab, photo, hypothesis, preset, *places],
            "outputs": [*captioned, *judged],
            # Of the events that wait while one is worked on, the last one counts.
            "trigger_mode": "always_last",
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",
            **private,
        }
        gr.on([photo.change, hypothesis.submit, *(slider.input for slider in places)], **work)
        preset.input(lambda name: list(slider_values(model, name).values()), preset, places, **private).then(**work)
        for name, selected in (("caption", caption_tab), ("entailment", entailment_tab)):
            selected.select(partial(str, name), None, tab, **private).then(**work)
    return page


def _exit_inputs(model: MuEForConditionalGeneration) -> tuple[Any, dict[str, Any]]:
    """The choice of presets, and the sliders by the option that they move."""
    import gradio as gr

    presets = preset_names(model)
    first = DEFAULT_PRESET if DEFAULT_PRESET in presets else FULL_DEPTH
    preset = gr.Dropdown(presets, value=first, label="Preset")
    sliders = {}
    for name, value in slider_values(model, first).items():
        greatest, step = SLIDERS[name]
        sliders[name] = gr.Slider(0, greatest, value, step=step, label=name, elem_id=name, buttons=[])
    gr.Markdown(SLIDER_HELP, elem_classes="note")
    return preset, sliders


def _caption_outputs() -> list[Any]:
    import gradio as gr

    with gr.Row():
        captions = [
            gr.Textbox(label=label, elem_id=name, placeholder="Pick a photo, or upload one.")
            for label, name in zip(WAYS, ("caption", "full_caption"), strict=True)
        ]
    outputs = [*captions, gr.HTML(elem_id="figures"), gr.HTML(elem_id="depths")]
    gr.Markdown(DEPTH_HELP, elem_classes="note")
    outputs.append(gr.Plot(show_label=False, elem_id="curves", format="png"))
    gr.Markdown(CURVE_HELP, elem_classes="note")
    return outputs


def _entailment_outputs() -> tuple[Any, list[Any]]:
    """The statement, and the outputs."""
    import gradio as gr

    placeholder = "a cat is looking up"
    hypothesis = gr.Textbox(label="Statement", placeholder=placeholder, submit_btn="Judge", elem_id="hypothesis")
    with gr.Row():
        labels = [gr.Label(label=label) for label in WAYS]
    return hypothesis, [*labels, gr.HTML(elem_id="answer_figures"), gr.HTML(elem_id="answer_depths")]


@dataclass
class _Worker:
    """What is done when something on the page changes: arguments of [`build_page`], what the sliders move, and the
    outputs of both tabs."""

    model: MuEForConditionalGeneration
    processor: MuEProcessor
    repeats: int
    options: list[str]
    captioned: list[Any]
    judged: list[Any]

    def refresh(self, tab: str, photo: Any, hypothesis: str, preset: str, *values: float) -> Any:
        """New values by component, or a sign that there is nothing to do."""
        import gradio as gr

        if photo is None or (tab == "entailment" and not (hypothesis or "").strip()):
            return gr.skip()
        try:
            exits = exit_choice(self.model, preset, dict(zip(self.options, values, strict=True)))
            if tab == "entailment":
                outputs, shown = self.judged, self.judge(load_image(photo), hypothesis, exits)
            else:
                outputs, shown = self.captioned, self.caption(load_image(photo), exits)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error)) from error
        return dict(zip(outputs, shown, strict=True))

    def caption(self, photo: Any, exits: dict[str, Any]) -> list[Any]:
        record, figure = caption_photo(self.model, self.processor, photo, exits, self.repeats)
        tokens = [(token["text"].strip(), token["layers"]) for token in record["tokens"]]
        return [record["caption"], record["full_depth_caption"], *self._html(record, exits, tokens), figure]

    def judge(self, photo: Any, hypothesis: str, exits: dict[str, Any]) -> list[Any]:
        record = judge_statement(self.model, self.processor, photo, hypothesis, exits, self.repeats)
        answers = [("answer", depth) for depth in record["answer_exit_layers"]]
        return [record["probabilities"], record["full_depth_probabilities"], *self._html(record, exits, answers)]

    def _html(self, record: dict[str, Any], exits: dict[str, Any], decoded: list[tuple[str, int]]) -> tuple[str, str]:
        """The figures, and the map of depths: the encoder's streams and what was decoded."""
        config = self.model.config
        columns = [(name, record[f"{name}_exit_layers"], config.layers_of(name)) for name in ("image", "text")]
        columns += [(name, depth, config.decoder_layers) for name, depth in decoded]
        return show_figures(self.model, record, exits, self.repeats), depth_map(columns)


def serve(page: Any, **options: Any) -> Any:
    """Shows a page of [`build_page`], with options of `gradio.Blocks.launch`, until it is interrupted.

    Raises:
        OSError: if the port is taken.
    """
    from gradio.themes import Default

    # Nothing is fetched from elsewhere, and nothing is kept in the browser.
    theme = Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    settings = {"ssr_mode": False, "run_history": False, "footer_links": ["gradio"], "max_file_size": "32mb"}
    return page.launch(theme=theme, css=CSS, show_error=True, **settings | options)


__all__ = ["build_page", "find_photos", "require_extra", "serve"]
