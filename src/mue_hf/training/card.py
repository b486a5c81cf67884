"""The model card: its template, what a model's makers state, and the card of what `MuETrainer` has trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TrainingSummary

from ..model.exit_options_mue import CONFIG_NAMES

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass(frozen=True)
class About:
    """What neither a checkpoint nor a record of an evaluation knows, from a TOML file with these names.

    Args:
        summary (`str`): what the model is, in a paragraph.
        language (`str`): code of the language of its outputs, e.g. "en".
        base_model, datasets (`list[str]`): Hub ids of what it was made from and trained on.
        commands (`str`): what calibrated the presets and evaluated them, as it was typed.
        training, license_note (`str`): data and training, and what to say about the license, in Markdown.
        license, license_name, license_link (`str`): as the Hub calls it, e.g. "apache-2.0"; the others of "other".
        limits (`list[str]`): what the model cannot do, a sentence each.
        data_names (`dict[str, str]`): what people call the data of evaluations: file name or Hub id to name.
    """

    summary: str = ""
    language: str = ""
    base_model: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    commands: str = ""
    training: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    license_note: str = ""
    limits: list[str] = field(default_factory=list)
    data_names: dict[str, str] = field(default_factory=dict)


def fill_card(
    model: PreTrainedModel,
    model_id: str,
    about: About,
    promises: Mapping[str, str],
    groups: Sequence[Mapping[str, Any]] = (),
    results: Sequence[EvalResult] = (),
    carries_code: bool = True,
) -> str:
    """The filled template: Markdown with a metadata block.

    Args:
        model, model_id: what is described, and the Hub id or folder by which it is loaded.
        about ([`About`]): what its makers state.
        promises (`dict[str, str]`): what each of the model's exit presets promises, by name.
        groups: for each table of the evaluation its "title", "table", "plot" and "conditions", in Markdown.
        results: the entries of the model index.
        carries_code (`bool`, *optional*, defaults to `True`): whether it loads without this package.
    """
    name = PurePath(model_id).name
    trunk = model.config.backbone_config
    names = ("language", "license", "license_name", "license_link", "base_model", "datasets")
    stated: dict[str, Any] = {key: getattr(about, key) or None for key in names}
    data = ModelCardData(
        **stated,
        # Another library here, and `pipeline(model=...)` would refuse the model.
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["mue", "ofa", "early-exit", "image-captioning"],
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    presets: list[dict[str, str]] = []
    captioning: str | None = None
    for label, preset in exit_presets(model).items():
        # a fit on answers is refused where tokens are generated
        if captioning is None and (preset.get("exit_fit") or {}).get("answers") is None:
            captioning = label
        told = {option: value for option, value in preset.items() if option in CONFIG_NAMES and option != "exit_fit"}
        options = ", ".join(f"{option}={value!r}" for option, value in told.items())
        presets.append({"name": label, "options": options, "promise": promises[label]})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        about=about,
        captioning_preset=captioning,
        carries_code=carries_code,
        config=model.config,
        groups=groups,
        model_id=model_id,
        model_name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        presets=presets,
        trunk=getattr(trunk, "backbone", None) or trunk.model_type,
    )
    return f"{card}\n"


def exit_presets(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The exit presets in the model's generation config, by name."""
    return getattr(model.generation_config, "exit_presets", None) or {}


def trainer_card(trainer: Any, *args: Any, **kwargs: Any) -> str:
    """The card of what a [`MuETrainer`] has trained; the other arguments are those of `Trainer.create_model_card`."""
    summary = TrainingSummary.from_trainer(trainer, *args, **kwargs)
    steps = [f"* {name}: {value}" for name, value in (summary.hyperparameters or {}).items()]
    results = [f"* {name}: {value}" for name, value in (summary.eval_results or {}).items()]
    parts = ["Trained with `MuETrainer` on the loss of all decoder layers.", "\n".join(steps)]
    if results:
        parts += ["On its evaluation data:", "\n".join(results)]
    about = About(
        language=_listed(summary.language)[0] if summary.language else "",
        base_model=_listed(summary.finetuned_from),
        datasets=_listed(summary.dataset_tags),
        training="\n\n".join(parts),
        license=summary.license or "",
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    promises = {
        # A guarantee is about the weights that were calibrated.
        name: "none: calibrated before this training" if "risk" in preset else "none: chosen by hand"
        for name, preset in exit_presets(model).items()
    }
    return fill_card(model, trainer.hub_model_id or summary.model_name, about, promises)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value or [])


__all__ = ["TEMPLATE", "About", "exit_presets", "fill_card", "trainer_card"]
