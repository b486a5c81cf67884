"""The arguments of one evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EvaluationArguments:
    """
    Which points are compared, on which data, and how they are scored and timed.

    Args:
        task, data, split, limit, kind_column, data_options: the rows, see [`load_rows`].
        output (`Path`): a .jsonl file that records are added to; outputs by row go to a folder beside it.
        features (`str`): folder where the trunk's features are cached.
        premise, images: controls of entailment: no premises; every image in another one's place ("shuffled"), or none.
        words_baseline (sequence of `str`), words_split (`str`): the statements that a baseline of words alone learns
            from, see [`words_baseline`]: sources such as `data`, and their split, "all" for every row.
        decoding (`dict`): options of `generate` besides exits.
        prompt_type, batch_size: see [`predict`].
        exits, presets, sweeps, chosen, shuffled_depths: the points, see [`make_settings`]; `exits` is its `base`.
        thresholds_split (`str`): the split whose signals give the thresholds of similarity: at most `num_thresholds`
            per stream, from `thresholds_rows` rows.
        oracle (`bool`): whether the token oracle is a point; needs greedy decoding.
        against (`str`): the point that differences are taken to.
        metrics, tokenizer, resamples: see [`caption_scores`].
        time_rows, time_batch_size, time_repeats (`int`): rows to time, none for 0, in which batches and how often.
    """

    task: str
    data: str
    output: Path
    split: str = "test"
    limit: int | None = None
    kind_column: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    features: str | None = None
    premise: bool = True
    images: str = "own"
    words_baseline: Sequence[str] = ()
    words_split: str = "train"
    prompt_type: str = "prev_output"
    batch_size: int = 16
    decoding: Mapping[str, Any] = field(default_factory=dict)
    exits: Mapping[str, Any] = field(default_factory=dict)
    presets: Sequence[str] = ()
    sweeps: Sequence[tuple[str, Sequence[float] | None]] = ()
    chosen: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    shuffled_depths: Sequence[str] = ()
    thresholds_split: str | None = None
    num_thresholds: int = 6
    thresholds_rows: int = 200
    oracle: bool = False
    against: str = "full depth"
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider")
    tokenizer: str = "ptb"
    resamples: int = 1000
    time_rows: int = 20
    time_batch_size: int = 1
    time_repeats: int = 5

    def __post_init__(self) -> None:
        if self.output.suffix != ".jsonl":
            raise ValueError(f"`output` must be a .jsonl file, got {str(self.output)!r}; rename it.")
        controlled = not self.premise or self.images != "own" or self.prompt_type != "prev_output"
        if self.task == "captioning" and controlled:
            raise ValueError("`premise`, `images` and `prompt_type` belong to entailment; leave them as they are.")
        if self.task == "captioning" and self.words_baseline:
            raise ValueError("`words_baseline` belongs to entailment: it gives labels to statements; leave it out.")
        if self.task == "entailment" and self.decoding:
            raise ValueError(f"Options of decoding belong to captioning, got {sorted(self.decoding)}; drop them.")


__all__ = ["EvaluationArguments"]
