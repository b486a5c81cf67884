"""What the `compute_metrics` of a trainer share: token ids out of what they are given, and a check of options."""

import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import EvalPrediction


def without_masks(ids: ArrayLike, processor: Any) -> NDArray:
    """`ids` [samples, tokens] with padding where the trainer or the collator has put -100."""
    return np.where(np.asarray(ids) < 0, processor.tokenizer.pad_token_id, ids)


def generated_ids(prediction: EvalPrediction, processor: Any) -> NDArray:
    """The generated ids [samples, tokens] of `prediction`; ValueError if the trainer has not generated."""
    ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    if np.ndim(ids) != 2:
        raise ValueError(
            f"`predictions` must be generated ids [samples, tokens], got shape {np.shape(ids)}; set "
            "`predict_with_generate=True` in the training arguments."
        )
    return without_masks(ids, processor)


def check_options(name: str, scores: Callable, options: Mapping[str, Any], others: Set[str]) -> None:
    """Raises TypeError for `options` of the function `name` that are no arguments of `scores`, or some of `others`."""
    known = inspect.signature(scores).parameters.keys() - others
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"`{name}` takes the options {sorted(known)}, got {unknown}.")


__all__ = ["check_options", "generated_ids", "without_masks"]
