"""MuE: multiple exits for OFA-like vision-language encoder-decoders, through transformers' own classes.

Importing the package registers its classes with the Auto classes and its pipeline with `pipeline()`, so that
`from_pretrained` and `pipeline` know them without `trust_remote_code`. Models of other types are not affected.

What training takes is imported when it is first asked for, and needs the packages of the extra `train`.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

from ._moved import MovedModules
from .model.cache_mue import MuECache
from .model.configuration_mue import MuEConfig
from .model.criteria_mue import Criterion, register_criterion
from .model.exit_options_mue import ExitOptions
from .model.modeling_mue import MuEForConditionalGeneration, MuEModel, MuEPreTrainedModel
from .model.pipeline_mue import MuEImageTextToTextPipeline, MuEImageToTextPipeline, register_pipelines
from .model.processing_mue import MuEImageProcessor, MuEImageProcessorPil, MuEProcessor, MuETokenizer

__version__ = version("mue-hf")

# Name -> its module.
_TRAINING = {
    "CaptionPairs": "data",
    "CiderDReward": "metrics.rewards",
    "MuEDataCollator": "data",
    "MuETrainer": "training.trainer",
    "MuETrainingArguments": "training.arguments",
    "SceneDataset": "data.scenes",
    "cache_trunk_features": "data.features",
    "load_captioning": "data",
    "load_entailment": "data",
}

AutoConfig.register("mue", MuEConfig, exist_ok=True)
AutoImageProcessor.register(
    MuEConfig,
    image_processor_classes={"torchvision": MuEImageProcessor, "pil": MuEImageProcessorPil},
    exist_ok=True,
)
AutoModel.register(MuEConfig, MuEModel, exist_ok=True)
AutoModelForImageTextToText.register(MuEConfig, MuEForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(MuEConfig, MuEForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MuEConfig, MuEProcessor, exist_ok=True)
AutoTokenizer.register(MuEConfig, tokenizer_class=MuETokenizer, exist_ok=True)
register_pipelines()
sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        # transformers would miss it only when a trainer is made.
        import_module("accelerate")
        module = import_module(f".{_TRAINING[name]}", __name__)
    except ImportError as error:
        raise ImportError(f"`{name}` needs the extra `train` ({error}): pip install 'mue-hf[train]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _TRAINING.keys())


__all__ = [
    "Criterion",
    "ExitOptions",
    "MuECache",
    "MuEConfig",
    "MuEForConditionalGeneration",
    "MuEImageProcessor",
    "MuEImageProcessorPil",
    "MuEImageTextToTextPipeline",
    "MuEImageToTextPipeline",
    "MuEModel",
    "MuEPreTrainedModel",
    "MuEProcessor",
    "MuETokenizer",
    "register_criterion",
]
