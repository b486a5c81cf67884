"""What a calibration is to reach, and whether its arguments and data allow that."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..inference.predict import TASKS
from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import CONFIG_NAMES
from .bounds import METHODS, check_choice, check_share

RISKS = ("disagreement", "metric")
# "confidence": with probability 1 - delta the preset keeps the budget. "expectation": the mean over calibrations does.
GUARANTEES = ("confidence", "expectation")
OBJECTIVES = ("flops", "time", "calls")
# Exit options that every candidate may share; the others are what calibration finds.
SHARED_OPTIONS = ("exit_decay_tau", "exit_kv", "exit_min_layers", "exit_rescore")


def calibrated_criteria() -> list[str]:
    """Names of the criteria that can be calibrated: all that have values to try."""
    return [name for name, criterion in CRITERIA.items() if criterion.sweep_options]


@dataclass(frozen=True)
class Goal:
    """What is promised and what is saved; the fields are arguments of [`calibrate`], checked."""

    task: str
    risk: str
    budget: float | None
    compute: float | None
    objective: str
    delta: float
    method: str
    guarantee: str = "confidence"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.compute is None):
            given = f"{self.budget} and {self.compute}"
            raise ValueError(f"`budget` or `compute` must be given, got {given}; set the other to None.")
        if self.guarantee == "expectation" and self.budget is None:
            raise ValueError(
                f"`guarantee={self.guarantee!r}` must go with a `budget`, got `compute={self.compute}`; set a budget, "
                'or take "confidence".'
            )
        for name in ("budget", "compute", "delta"):
            check_share(name, getattr(self, name))
        choices = {"task": TASKS, "risk": RISKS, "guarantee": GUARANTEES, "objective": OBJECTIVES, "method": METHODS}
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)

    @property
    def most_risk(self) -> float:
        """The greatest expected risk with which a candidate is worth a run."""
        return 1.0 if self.budget is None else 2 * self.budget

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises a ValueError unless there are two images, and labels or references if the risk needs them."""
        images = len({row["image_id"] for row in rows})
        if images < 2:
            raise ValueError(f"`data` must hold at least two images, one to search and one to test, got {images}.")
        needed = "references" if self.task == "captioning" else "label"
        if self.risk == "metric" and not all(row.get(needed) for row in rows):
            raise ValueError(f'`data` must have `{needed}` for `risk="metric"`, got some without; use "disagreement".')


def check_search(criteria: Sequence[str], betas: Sequence[float], **counts: int) -> None:
    """Raises a ValueError unless there is something to try."""
    for name, count in {**counts, "criteria": len(criteria), "betas": len(betas)}.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}; pass more.")
    for criterion in criteria:
        check_choice("criteria", criterion, calibrated_criteria())
    if not all(0.0 < beta <= 1.0 for beta in betas):
        raise ValueError(f"`betas` must be above 0 and at most 1, got {list(betas)}; 1 is no decay.")


def check_streams(streams: Sequence[str], known: Iterable[str]) -> None:
    """Raises a ValueError unless there are streams that may exit, all of them `known`."""
    if not streams or not set(streams) <= set(known):
        raise ValueError(
            f"`streams` must be one or more of {list(known)}, the streams of this model, got {list(streams)}; correct "
            "it, or leave it out for all."
        )


def check_options(options: Mapping[str, Any], samples: bool) -> None:
    """Raises a ValueError for options of `generate` that calibration finds, or that sample outputs (the model's own
    choice is `samples`)."""
    foreign = sorted((options.keys() & CONFIG_NAMES) - set(SHARED_OPTIONS))
    if foreign:
        raise ValueError(
            f"`options` may hold the exit options {list(SHARED_OPTIONS)} only, got {foreign}; calibration finds "
            "thresholds, depths and decay itself: pass `criteria` and `betas`."
        )
    if options.get("do_sample", samples):
        raise ValueError("`do_sample` must be False, got True: sampled outputs differ from run to run; turn it off.")


__all__ = [
    "GUARANTEES",
    "OBJECTIVES",
    "RISKS",
    "SHARED_OPTIONS",
    "Goal",
    "calibrated_criteria",
    "check_options",
    "check_search",
    "check_streams",
]
