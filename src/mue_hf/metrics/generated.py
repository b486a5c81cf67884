"""Token ids out of what a trainer hands to `compute_metrics`."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import EvalPrediction


def without_masks(ids: ArrayLike, processor: Any) -> NDArray:
    """`ids` [samples, tokens] with padding where the trainer or the collator has put -100."""
    ids = np.asarray(ids)
    return np.where(ids < 0, processor.tokenizer.pad_token_id, ids)


def generated_ids(prediction: EvalPrediction, processor: Any) -> NDArray:
    """The generated ids [samples, tokens] of `prediction`.

    Raises:
        ValueError: if the trainer has not generated.
    """
    ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    if np.ndim(ids) != 2:
        raise ValueError(
            f"`predictions` must be generated ids [samples, tokens], got shape {np.shape(ids)}; set "
            "`predict_with_generate=True` in the training arguments."
        )
    return without_masks(ids, processor)


__all__ = ["generated_ids", "without_masks"]
