"""What a MuE model is made of: every size, flag and special token, checked before a weight is allocated."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict, validated_field
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, auto_docstring

if TYPE_CHECKING:
    # Never run: transformers copies a source file together with all that it imports from. These reach every other
    # file, so that each copy of this one lies beside the whole set and can pass it on.
    from .modeling_mue import MuEModel  # noqa: F401
    from .pipeline_mue import MuEImageToTextPipeline  # noqa: F401
    from .processing_mue import MuEProcessor  # noqa: F401

# The file names are those that `save_pretrained` puts beside the weights, so that the folder loads with
# `trust_remote_code=True` where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_mue.MuEConfig",
    "AutoModel": "modeling_mue.MuEModel",
    "AutoModelForImageTextToText": "modeling_mue.MuEForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_mue.MuEForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "image-to-text": "pipeline_mue.MuEImageToTextPipeline",
    "image-text-to-text": "pipeline_mue.MuEImageTextToTextPipeline",
}

# OFA's trunk: a ResNet v1.5 of bottlenecks without its last stage (stride 16, 1024 channels).
RESNET_DEPTHS = {"resnet18": [2, 2, 2], "resnet50": [3, 4, 6], "resnet101": [3, 4, 23], "resnet152": [3, 8, 36]}

# OFA's vocabulary ends with 8,192 image codes and 1,000 location bins.
OFA_VOCAB_SIZE, OFA_TEXT_VOCAB_SIZE = 59457, 50265

# OFA's published sizes: model width, feed-forward width, heads, encoder and decoder layers, trunk.
SIZES = {
    "tiny": (256, 1024, 4, 4, 4, "resnet50"),
    "medium": (512, 2048, 8, 4, 4, "resnet101"),
    "base": (768, 3072, 12, 6, 6, "resnet101"),
    "large": (1024, 4096, 16, 12, 12, "resnet152"),
    "huge": (1280, 5120, 16, 24, 12, "resnet152"),
}


def resnet_backbone_kwargs(name: str) -> dict[str, Any]:
    """Arguments of a transformers `ResNetConfig` that equals OFA's trunk `name`, last stage left out."""
    if name not in RESNET_DEPTHS:
        raise ValueError(f"`name` must be one of {sorted(RESNET_DEPTHS)}, got {name!r}.")
    return {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024],
        "depths": list(RESNET_DEPTHS[name]),
        "layer_type": "bottleneck",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage3"],
    }


def _must_be(rule: str, holds: Callable[[Any], bool], remedy: str = "") -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not holds(value):
            raise ValueError(f"must be {rule}, got {value!r}{remedy}")

    return check


def _at_least(minimum: int) -> Callable[[Any], None]:
    rule = f"an integer of at least {minimum}"
    return _must_be(rule, lambda value: value >= minimum, "; pass a larger number")


_share = _must_be("a share in [0, 1)", lambda value: 0.0 <= value < 1.0, "; pass 0 to turn it off")
_positive = _must_be("a finite number above 0", lambda value: 0 < value <= sys.float_info.max)
_activation = _must_be(f"one of {sorted(ACT2FN)}", lambda value: value in ACT2FN)


@auto_docstring(checkpoint="org/mue-ofa")
@strict
class MuEConfig(PreTrainedConfig):
    r"""
    token_bucket_size (`int`, *optional*, defaults to 256): Distances in text beyond half of it share logarithmic
        buckets of the relative position bias.
    image_bucket_size (`int`, *optional*, defaults to 42): Largest number of patch rows and of patch columns. Patch
        (row, column) has the position `row * image_bucket_size + column + 1` whatever the width of the image.
    attn_scale_factor (`float`, *optional*, defaults to 2.0): Content scores and position scores are both divided by
        its square root, since they are added.
    encoder_drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth of the last encoder layer in
        training; it grows linearly from 0 at the first.
    decoder_drop_path_rate (`float`, *optional*, defaults to 0.0): The same for the decoder.
    backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to OFA's ResNet-101): Any transformers or timm
        backbone. The last of its `out_features` becomes the image tokens.
    modality_decomposition (`bool`, *optional*, defaults to `True`): True (MuE): image and text are separate streams
        through the same encoder layers, each with its own exit. False (OFA): one joint sequence with one exit.
    image_layers (`int`, *optional*): Layers of the encoder stack that the image stream runs at full depth; all of
        `encoder_layers` by default. `mue-hf trim` sets it.
    text_layers (`int`, *optional*): The same of the text stream.
    trimmed_from (`dict`, *optional*): Of what `mue-hf trim` wrote: the name of the checkpoint that it was made from
        ("checkpoint"), and how many layers that has ("encoder_layers", "decoder_layers").
    image_relative_bias (`bool`, *optional*, defaults to `True`): False drops the relative position bias between
        patches, as the authors' released code does unintentionally, for checkpoints trained with it.
    add_position_embedding (`bool`, *optional*, defaults to `False`): Whether the encoder's (normalised) positions are
        also added to its embeddings. False (OFA): positions act on the attention scores alone.
    text_vocab_size (`int`, *optional*): Token ids from here on stand for image codes and location bins: `generate`
        neither computes nor emits them, unless `prefix_allowed_tokens_fn` says what may follow. Default: 50265 if
        `vocab_size` is OFA's 59457, else `vocab_size`, with which a model emits everything, as grounding needs.
    code_image_size (`int`, *optional*, defaults to 128): Kept for OFA's configuration files; without effect here.

    Example:

    ```python
    >>> from mue_hf import MuEConfig, MuEForConditionalGeneration

    >>> config = MuEConfig.from_size("tiny")
    >>> model = MuEForConditionalGeneration(config)
    ```"""

    model_type = "mue"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig, model_type="resnet", init_kwargs=resnet_backbone_kwargs("resnet101")
        )
    }

    vocab_size: int = validated_field(_at_least(1), default=OFA_VOCAB_SIZE)
    text_vocab_size: int | None = None
    max_position_embeddings: int = validated_field(_at_least(1), default=1024)
    d_model: int = validated_field(_at_least(1), default=768)
    encoder_layers: int = validated_field(_at_least(1), default=6)
    image_layers: int | None = None
    text_layers: int | None = None
    encoder_ffn_dim: int = validated_field(_at_least(1), default=3072)
    encoder_attention_heads: int = validated_field(_at_least(1), default=12)
    decoder_layers: int = validated_field(_at_least(1), default=6)
    decoder_ffn_dim: int = validated_field(_at_least(1), default=3072)
    decoder_attention_heads: int = validated_field(_at_least(1), default=12)
    activation_function: str = validated_field(_activation, default="gelu")
    dropout: float | int = validated_field(_share, default=0.1)
    attention_dropout: float | int = validated_field(_share, default=0.0)
    activation_dropout: float | int = validated_field(_share, default=0.0)
    encoder_drop_path_rate: float | int = validated_field(_share, default=0.0)
    decoder_drop_path_rate: float | int = validated_field(_share, default=0.0)
    init_std: float = validated_field(_positive, default=0.02)
    token_bucket_size: int = validated_field(_at_least(4), default=256)
    image_bucket_size: int = validated_field(_at_least(1), default=42)
    attn_scale_factor: float | int = validated_field(_positive, default=2.0)
    code_image_size: int = validated_field(_at_least(1), default=128)
    backbone_config: dict | PreTrainedConfig | None = None
    modality_decomposition: bool = True
    image_relative_bias: bool = True
    add_position_embedding: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    trimmed_from: dict | None = None
    pad_token_id: int = validated_field(_at_least(0), default=1)
    bos_token_id: int = validated_field(_at_least(0), default=0)
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int = validated_field(_at_least(0), default=0)

    def __post_init__(self, **kwargs: Any) -> None:
        # Both make `pipeline()` demand trust_remote_code, which the installed package does not need; only the copy of
        # this class that a checkpoint carries keeps them.
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        if isinstance(self.backbone_config, dict):
            kind = self.backbone_config.get("model_type")
            if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"`backbone_config` must have a `model_type` that transformers knows, such as 'resnet' or "
                    f"'timm_backbone', got {kind!r}; set it."
                )
        self.backbone_config, kwargs = self.sub_configs_defaults["backbone_config"].create_subconfig(
            "backbone_config", self.backbone_config, **kwargs
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Rules between fields; runs on construction and on save."""
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, field)
            if self.d_model % heads:
                raise ValueError(
                    f"`{field}` must divide `d_model`, got {heads} heads for d_model={self.d_model}; change either."
                )
        for field in ("image_layers", "text_layers"):
            layers = getattr(self, field)
            if layers is not None and not self.modality_decomposition:
                raise ValueError(
                    f"`{field}` must be left out of a model with a joint encoder, got {layers}; set `encoder_layers`."
                )
            if layers is not None and not 1 <= layers <= self.encoder_layers:
                raise ValueError(
                    f"`{field}` must lie in [1, {self.encoder_layers}], the latter being `encoder_layers`, got "
                    f"{layers}; leave it out to run all."
                )
        if self.token_bucket_size % 2:
            raise ValueError(f"`token_bucket_size` must be even, got {self.token_bucket_size}; add or subtract one.")
        if self.max_position_embeddings < self.token_bucket_size // 2 + 2:
            raise ValueError(
                f"`max_position_embeddings` must be at least half of `token_bucket_size` plus 2, got "
                f"{self.max_position_embeddings} and {self.token_bucket_size}; lower `token_bucket_size`."
            )
        if self.text_vocab_size is not None and not 1 <= self.text_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`text_vocab_size` must lie in [1, {self.vocab_size}], the latter being `vocab_size`, got "
                f"{self.text_vocab_size}; leave it out for the default."
            )
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        tokens = {"pad": self.pad_token_id, "bos": self.bos_token_id, "decoder_start": self.decoder_start_token_id}
        for name, token in [*tokens.items(), *(("eos", token) for token in eos)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"`{name}_token_id` must lie in the vocabulary [0, {self.vocab_size}), got {token}; "
                    f"change it or raise `vocab_size`."
                )

    def validate_exit_names(self) -> None:
        """Refuses exit options, which would have no effect here."""
        if names := sorted(name for name in vars(self) if "exit" in name):
            raise ValueError(
                f"`MuEConfig` must not hold exit options, got {names}; pass them to `generate`, or set them on "
                f"`model.generation_config`."
            )

    @property
    def num_text_tokens(self) -> int:
        """How many token ids are text; the others follow them."""
        if self.text_vocab_size is not None:
            return self.text_vocab_size
        return OFA_TEXT_VOCAB_SIZE if self.vocab_size == OFA_VOCAB_SIZE else self.vocab_size

    def layers_of(self, stream: str) -> int:
        """Full depth of a stream: "image", "text", "encoder" (the joint sequence, or the whole stack) or "decoder"."""
        own = {"image": self.image_layers, "text": self.text_layers, "decoder": self.decoder_layers}.get(stream)
        return self.encoder_layers if own is None else own

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "MuEConfig":
        """One of OFA's published sizes ("tiny", "medium", "base", "large", "huge"), with any field overridden."""
        if size not in SIZES:
            raise ValueError(f"`size` must be one of {sorted(SIZES)}, got {size!r}; pass fields to MuEConfig instead.")
        width, ffn, heads, encoder_layers, decoder_layers, trunk = SIZES[size]
        fields = {
            "d_model": width,
            "encoder_ffn_dim": ffn,
            "decoder_ffn_dim": ffn,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "backbone_config": resnet_backbone_kwargs(trunk),
        }
        return cls(**fields | overrides)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the entries that let the folder load without the package."""
        pipelines = {
            task: {"impl": name, "pt": ["AutoModelForImageTextToText"]} for task, name in CUSTOM_PIPELINES.items()
        }
        return super().to_dict() | {"auto_map": dict(AUTO_MAP), "custom_pipelines": pipelines}

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json and the source files that `trust_remote_code=True` needs."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for source in Path(__file__).parent.glob("*_mue.py"):
            target = Path(save_directory) / source.name
            if target.resolve() != source.resolve():
                shutil.copyfile(source, target)


__all__ = ["MuEConfig", "resnet_backbone_kwargs"]
