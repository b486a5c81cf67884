"""MuE: multiple exits for OFA-like vision-language encoder-decoders, through transformers' own classes.

Importing the package registers its classes with the Auto classes, so that `from_pretrained` and `pipeline` know them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from .cache_mue import MuECache
from .configuration_mue import MuEConfig
from .early_exit_mue import ExitOptions
from .modeling_mue import MuEForConditionalGeneration, MuEModel, MuEPreTrainedModel

AutoConfig.register("mue", MuEConfig, exist_ok=True)
AutoModel.register(MuEConfig, MuEModel, exist_ok=True)
AutoModelForImageTextToText.register(MuEConfig, MuEForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(MuEConfig, MuEForConditionalGeneration, exist_ok=True)

__all__ = [
    "ExitOptions",
    "MuECache",
    "MuEConfig",
    "MuEForConditionalGeneration",
    "MuEModel",
    "MuEPreTrainedModel",
]
