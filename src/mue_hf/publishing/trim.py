"""A checkpoint cut to fixed depths: it holds the layers that these run, and full depth is where they exit."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..evaluation.signals import stream_layers
from ..files import whole_folder, write_whole
from ..model.exit_options_mue import CONFIG_NAMES, LAYER_OPTIONS, ExitOptions, exit_attributes, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import weights_fingerprint
from ..model.processing_mue import MuEProcessor
from .checkpoint import check_folder, load_complete_model, weight_files
from .model_card import About, render_card


def trim_checkpoint(
    checkpoint: str | os.PathLike, target: str | os.PathLike, exits: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint that has only the layers that a model runs at fixed depths, whole or not at all. Its outputs
    are those of `checkpoint` under `exits`. Presets and other exit options are not carried over: they are about the
    layers that were there. The rest of the generation config is.

    Args:
        checkpoint (path): a checkpoint folder.
        target (path): the folder to write, which must be empty or none yet.
        exits (`dict`): `image_exit_layer`, `text_exit_layer` and `decoder_exit_layer`, of a joint model
            `encoder_exit_layer` and `decoder_exit_layer`, without which a stream keeps all layers; or `exit_preset`,
            one of such depths.
        overwrite (`bool`, *optional*, defaults to `False`): True replaces a checkpoint that is there.

    Returns:
        `dict`: "checkpoint", the depth of each stream ("image_layers", "text_layers" or "encoder_layers", and
        "decoder_layers"), "parameters", and the size of the weight files in bytes ("bytes_before", "bytes_after").

    Raises:
        ValueError: if the checkpoint is not whole, something else is in `target`, or `exits` are not depths of this
            model, or not below its own.
    """
    source, target = Path(checkpoint), Path(target)
    check_folder(source)
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"the destination must be another folder than the checkpoint, got {target}; choose another.")
    with whole_folder(target, overwrite) as folder:
        # in the dtype of its config; files may hold a smaller one
        model = load_complete_model(source, "auto")
        depths = fixed_depths(model, exits)
        origin = {"checkpoint": source.resolve().name}
        origin |= {name: getattr(model.config, name) for name in ("encoder_layers", "decoder_layers")}
        every = model.state_dict().keys()
        trim_model(model, depths)
        model.config.trimmed_from = origin
        model.save_pretrained(folder, state_dict=_kept_tensors(source, every - model.state_dict().keys()))
        MuEProcessor.from_pretrained(source).save_pretrained(folder)
        write_whole(folder / "README.md", render_card(model, str(target), About()))
        if weights_fingerprint(load_complete_model(folder, "auto")) != weights_fingerprint(model):
            raise ValueError(f"what was written to {target} is not what was cut; try again, on another disk.")
        before, after = (sum(path.stat().st_size for path in weight_files(of)) for of in (source, folder))
    return {
        "checkpoint": str(target),
        **{f"{stream}_layers": layers for stream, layers in depths.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_before": before,
        "bytes_after": after,
    }


def _kept_tensors(checkpoint: Path, dropped: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's files as they are there, by name, without those that are dropped."""
    files = [path for path in weight_files(checkpoint) if path.suffix == ".safetensors"]
    return {name: tensor for path in files for name, tensor in load_file(path).items() if name not in dropped}


def fixed_depths(model: MuEForConditionalGeneration, exits: Mapping[str, Any]) -> dict[str, int]:
    """The layers that each stream of a model runs under `exits`; see [`trim_checkpoint`] for both and for errors."""
    given = {name: value for name, value in exits.items() if value is not None}
    preset, depths = given.get("exit_preset"), given.keys() & set(LAYER_OPTIONS.values())
    if unknown := sorted(given.keys() - {"exit_preset"} - depths):
        raise ValueError(f"`exits` must be depths or a preset, got {unknown}; drop them.")
    if (preset is None) == (not depths):
        raise ValueError(
            f"either a preset or the depth of at least one stream must be given, got {given}; name one of them."
        )
    saved = {"exit_presets": getattr(model.generation_config, "exit_presets", None)}
    call = {"exit_preset": preset} if preset is not None else {"exit_criterion": "fixed", **given}
    options = resolve_options(call, {}, saved, model.config)
    _check_fixed(options, preset)
    full = stream_layers(model.config)
    found = {stream: getattr(options, LAYER_OPTIONS[stream]) or layers for stream, layers in full.items()}
    if found == full:
        raise ValueError(f"the depth of some stream must be below that of the model, {full}, got {found}; lower one.")
    return found


def _check_fixed(options: ExitOptions, preset: str | None) -> None:
    """Raises a ValueError unless the same layers run for all inputs under these options."""
    reasons = {
        f"exit_criterion={options.exit_criterion!r}": options.exit_criterion != "fixed",
        f"exit_warmup={options.exit_warmup}": options.exit_warmup > 0,
        "exit_rescore=True": options.exit_rescore,
        "a depth for each row": any(isinstance(getattr(options, name), Tensor) for name in LAYER_OPTIONS.values()),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        what = "the exits" if preset is None else f"the preset {preset!r}"
        raise ValueError(
            f"{what} must be of fixed depths alone, under which the same layers run for all inputs, got "
            f"{', '.join(found)}; pass a number of layers for each stream instead."
        )


def trim_model(model: MuEForConditionalGeneration, depths: Mapping[str, int]) -> None:
    """Takes the layers out of a model, in place, that do not run at the depths of [`fixed_depths`], with their tables
    of relative positions and the saved exit options; its config then says these depths."""
    config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
    image, text = (depths[stream] if stream in depths else depths["encoder"] for stream in ("image", "text"))
    # one stack for both streams
    encoder.layers = encoder.layers[: max(image, text)]
    encoder.image_rel_pos_table_list = encoder.image_rel_pos_table_list[:image]
    encoder.token_rel_pos_table_list = encoder.token_rel_pos_table_list[:text]
    for name in ("layers", "image_rel_pos_table_list", "token_rel_pos_table_list"):
        setattr(decoder, name, getattr(decoder, name)[: depths["decoder"]])
    config.encoder_layers, config.decoder_layers = len(encoder.layers), len(decoder.layers)
    if config.modality_decomposition:
        config.image_layers, config.text_layers = image, text
    for name in exit_attributes(model.generation_config).keys() & CONFIG_NAMES:
        delattr(model.generation_config, name)
    # the depth of a draft, of the layers that were there
    model.generation_config.assistant_early_exit = None


__all__ = ["fixed_depths", "trim_checkpoint", "trim_model"]
