"""MuE: multiple exits for OFA-like vision-language encoder-decoders, through transformers' own classes.

Importing the package registers its classes with the Auto classes and its pipeline with `pipeline()`, so that
`from_pretrained` and `pipeline` know them without `trust_remote_code`. Models of other types are not affected.
"""

from importlib.metadata import version

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

from .cache_mue import MuECache
from .configuration_mue import MuEConfig
from .early_exit_mue import ExitOptions
from .modeling_mue import MuEForConditionalGeneration, MuEModel, MuEPreTrainedModel
from .pipeline_mue import MuEImageTextToTextPipeline, MuEImageToTextPipeline, register_pipelines
from .processing_mue import MuEImageProcessor, MuEImageProcessorPil, MuEProcessor, MuETokenizer

__version__ = version("mue-hf")

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

__all__ = [
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
]
