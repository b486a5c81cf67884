"""BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE of captions, as the field reports them."""

import re
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

from transformers import EvalPrediction

from .generated import check_options, generated_ids
from .intervals import check_resampling, flat_intervals, percentile_interval, resampling_weights

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")
TOKENIZERS = ("ptb", "plain", "pretokenized")
PLAIN_WORD = re.compile(r"\w+(?:[-']\w+)*")


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider"),
    tokenizer: str = "ptb",
    per_image: bool = False,
    resamples: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores one caption per image against the image's references, through pycocoevalcap.

    Args:
        predictions (sequence [images] of `str`): a caption per image; an empty one scores 0.
        references (sequence [images] of sequences of `str`): at least one reference per image.
        metrics (sequence of `str`): out of "bleu", "meteor" (needs Java), "rouge_l", "cider" and "spice" (needs Java
            and jars that do not come with pycocoevalcap). CIDEr is CIDEr-D, whose document frequencies are those of
            `references`: it depends on the other images, and is 0 for a set of one image.
        tokenizer (`str`, defaults to "ptb"): "ptb" is the one of published scores and needs Java. "plain" takes
            lower-case runs of letters and digits, inner hyphens and apostrophes included; "pretokenized" words between
            spaces. The names of their scores end with "_plain" and "_pretokenized".
        per_image (`bool`, defaults to False): also return each image's scores.
        resamples, seed (`int`, default to 0): draws of images for bootstrap intervals (0 for none), and their seed.
            BLEU and METEOR are computed anew from each draw's summed statistics, the others are means over images.
        confidence (`float`, defaults to 0.95): share of the draws inside an interval.

    Returns:
        `dict`: "bleu_1" to "bleu_4", "meteor", "rouge_l", "cider", "spice" to `float` (CIDEr is 10 for a perfect
        match, the others 1); with `per_image` "per_image", a `dict` of the same names to lists [images]; with
        `resamples` "intervals", a `dict` of the same names to (low, high).

    Raises:
        ValueError: for options out of range, lists of different lengths, and images whose references have no words.
        RuntimeError: where Java or jars are missing, saying what to install, or fail.
        ImportError: where pycocoevalcap is missing.
    """
    try:
        # Here, because the extra that they come from is not needed for anything else.
        from . import scorers
        from .java import ptb_tokenize, require_java, require_spice
    except ImportError as error:
        missing = "Caption scores need pycocoevalcap, which is not installed: pip install 'mue-hf[eval]'"
        raise ImportError(missing) from error
    _check(predictions, references, metrics, tokenizer)
    check_resampling(resamples, confidence)
    # Before the fast metrics have run for nothing.
    if "meteor" in metrics:
        require_java("METEOR")
    if "spice" in metrics:
        require_spice()

    # All kinds of white space, so that no character inside a caption ends its line.
    texts = [" ".join(text.split()) for text in (*chain.from_iterable(references), *predictions)]
    if tokenizer == "ptb":
        texts = ptb_tokenize(texts)
    elif tokenizer == "plain":
        texts = [" ".join(PLAIN_WORD.findall(text.lower())) for text in texts]
    remaining = iter(texts)
    references = [list(islice(remaining, len(candidates))) for candidates in references]
    predictions = list(remaining)
    if wordless := [i for i, candidates in enumerate(references) if not any(candidates)]:
        raise ValueError(
            f"`references[{wordless[0]}]` must hold words, got none after tokenization; leave the image out."
        )

    weights = resampling_weights(len(predictions), resamples, seed)
    label = "" if tokenizer == "ptb" else f"_{tokenizer}"
    scores: dict[str, scorers.Score] = {}
    for metric in (metric for metric in METRICS if metric in metrics):
        found = getattr(scorers, metric)(predictions, references, weights)
        scores |= {name + label: score for name, score in found.items()}
    result: dict[str, Any] = {name: float(score.value) for name, score in scores.items()}
    if per_image:
        result["per_image"] = {name: score.per_image.tolist() for name, score in scores.items()}
    if resamples:
        result["intervals"] = {name: percentile_interval(one.resampled, confidence) for name, one in scores.items()}
    return result


def caption_metrics(
    processor: Any, references: Sequence[Sequence[str]], **options: Any
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a trainer with `predict_with_generate=True`.

    Args:
        processor (`MuEProcessor`): turns generated ids into captions.
        references (sequence [images] of sequences of `str`): of the evaluation set, in its order.
        options: of [`caption_scores`], but for `per_image`; TypeError for others.

    Returns:
        `Callable`: from `EvalPrediction` with `predictions` [images, tokens] to scores; with `resamples` also the ends
        of their intervals, "<score>_low" and "<score>_high".
    """
    check_options("caption_metrics", caption_scores, options, {"predictions", "references", "per_image"})

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        ids = generated_ids(prediction, processor)
        return flat_intervals(caption_scores(processor.post_process_captions(ids), references, **options))

    return compute_metrics


def _check(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str], tokenizer: str
) -> None:
    if isinstance(metrics, str) or not metrics or set(metrics) - set(METRICS):
        raise ValueError(f"`metrics` must be a list out of {list(METRICS)}, got {metrics!r}; choose some of them.")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"`tokenizer` must be one of {list(TOKENIZERS)}, got {tokenizer!r}; choose one of them.")
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(
            f"`predictions` and `references` must have one entry per image, got {len(predictions)} and "
            f"{len(references)}; pass one caption and one list of references per image."
        )
    for i, (prediction, candidates) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"`predictions[{i}]` must be a text, got {prediction!r}; pass one caption per image.")
        if isinstance(candidates, str) or not candidates or not all(isinstance(text, str) for text in candidates):
            raise ValueError(f"`references[{i}]` must be a list of texts, got {candidates!r}; pass at least one.")


__all__ = ["METRICS", "TOKENIZERS", "caption_metrics", "caption_scores"]
