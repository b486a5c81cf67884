"""Module paths of version 0.1, which still work and warn: `from mue_hf.scenes import SceneDataset`."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> new name, both inside the package. Names that became a room of their own are not here.
MOVED = {
    "answer": "cli.answer",
    "answers_mue": "model.scoring_mue",
    "bench": "cli.bench",
    "benchmarking.arms": "benchmarking.variants",
    "bounds": "calibration.bounds",
    "bulk": "inference.bulk",
    "bulk_ray": "inference.bulk_ray",
    "cache_mue": "model.cache_mue",
    "calibrate": "calibration",
    "caption": "cli.caption",
    "configuration_mue": "model.configuration_mue",
    "convert_ofa": "convert.ofa",
    "costs": "_moved",
    "decoder_mue": "model.decoder_mue",
    "early_exit_mue": "model.early_exit_mue",
    "encoder_mue": "model.encoder_mue",
    "evaluate": "evaluation.run",
    "explain": "app.explain",
    "features": "data.features",
    "flops": "inference.flops",
    "generation_mue": "model.generation_mue",
    "journal": "inference.journal",
    "layers_mue": "model.layers_mue",
    "losses": "training.losses",
    "metrics.mue_captions": "metrics.captions_module",
    "metrics.mue_entailment": "metrics.entailment_module",
    "model_card": "publishing.model_card",
    "modeling_mue": "model.modeling_mue",
    "pipeline_mue": "model.pipeline_mue",
    "plots": "evaluation.plots",
    "predict": "inference.predict",
    "processing_mue": "model.processing_mue",
    "publish": "publishing.upload",
    "report": "app.report",
    "rewards": "metrics.rewards",
    "scenes": "data.scenes",
    "signals": "evaluation.signals",
    "sources": "inference.sources",
    "trainer": "training.trainer",
    "training_args": "training.arguments",
    "vision_mue": "model.vision_mue",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` under their old names: finder and loader of the import system, asked last."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that moved, None for all others."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at its new place, with a DeprecationWarning."""
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"`{spec.name}` is now `{new}`; the old path goes in 0.4.", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module back its own spec: it has run, under its own name."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def measure_costs(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Was: measured when batches should shrink. The cost model is gone, and rows leave at once; returns {}."""
    warnings.warn(
        "`measure_costs` measures nothing any more: exited rows leave the batch at once.", DeprecationWarning, 2
    )
    return {}


__all__ = ["MOVED", "MovedModules", "measure_costs"]
