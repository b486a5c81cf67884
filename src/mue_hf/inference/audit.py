"""Audits of bulk work: a share of the rows is run again at full depth, and a preset's budget of changes is watched."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from typing import Any

from ..metrics.betting import BudgetTest, share_interval
from ..model.exit_options_mue import CONFIG_NAMES, chosen_preset, exit_attributes, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import other_settings
from ..model.processing_mue import MuEProcessor

REACTIONS = ("warn", "stop", "full")
#: Columns that an audit adds, and their types.
AUDIT_COLUMNS = {"audited": "bool", "changed": "bool", "full_depth": "bool"}


class BudgetRefutedError(RuntimeError):
    """More outputs change than the preset's budget allows, and `on_drift` is "stop"."""


class Audit:
    """
    The audit of one run: which rows are run again at full depth, and what they say so far.

    A row is audited or not by its number and the seed alone, whatever the batches, workers and restarts are.

    Args:
        share (`float`): of the rows, in (0, 1].
        seed (`int`, *optional*, defaults to 0): another one draws other rows.
        budget (`float`, *optional*): the share of changed outputs, in (0, 1), that was promised, see
            [`promised_budget`]. The audited rows refute it with a probability of at most 5 % where every row keeps it.
        on_drift (`str`, *optional*, defaults to `"warn"`): what follows once the budget is refuted: "warn", once;
            "stop", after the row; or "full", which runs the rows after it, as far as they have not begun, at full
            depth, and warns too.
        full_depth (`bool`, *optional*, defaults to `False`): whether rows run at full depth already.

    Raises:
        ValueError: if an argument is not one of these, or `on_drift` needs a budget and there is none.
    """

    def __init__(
        self,
        share: float,
        *,
        seed: int = 0,
        budget: float | None = None,
        on_drift: str = "warn",
        full_depth: bool = False,
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"`audit` must be above 0 and at most 1, got {share}; pass a share of rows such as 0.02.")
        if on_drift not in REACTIONS:
            raise ValueError(f"`on_drift` must be one of {list(REACTIONS)}, got {on_drift!r}; choose one of them.")
        if budget is None and on_drift != "warn":
            raise ValueError(
                f"`on_drift={on_drift!r}` needs a budget of changed outputs, got none; name a preset that was "
                'calibrated for one, for this task and with no options beside it, or pass "warn".'
            )
        self.share, self.seed, self.budget, self.on_drift = share, seed, budget, on_drift
        self.full_depth = full_depth
        self.rows = self.changed = 0
        #: The row after which the budget was refuted.
        self.refuted_at: int | None = None
        self._test = None if budget is None else BudgetTest(budget)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which rows are audited."""
        return {"share": self.share, "seed": self.seed}

    def check_run(self, model: MuEForConditionalGeneration, task: str, options: Mapping[str, Any]) -> None:
        """Raises a ValueError if no row of a run could exit, or its outputs are sampled; see [`bulk_rows`]."""
        saved = exit_attributes(model.generation_config)
        if not resolve_options(options, {}, saved, model.config).active:
            raise ValueError("`audit` needs exits, got none: all rows run at full depth; name a preset or thresholds.")
        if task == "captioning" and options.get("do_sample", model.generation_config.do_sample):
            raise ValueError(
                "`audit` needs outputs that are not sampled, got `do_sample=True`: they differ from run to run; "
                "turn it off."
            )

    def draws(self, number: int) -> bool:
        """Whether the row of this number is audited."""
        drawn = int.from_bytes(sha256(f"{self.seed}:{number}".encode()).digest()[:8])
        return drawn < self.share * 2**64

    def see(self, record: Mapping[str, Any]) -> None:
        """Counts a row that is done; they come in their order. Warns if it refutes the budget."""
        if not record["audited"]:
            return
        self.rows += 1
        self.changed += record["changed"]
        if self._test is None or self.refuted_at is not None or not self._test.update(record["changed"]):
            return
        self.refuted_at, self.full_depth = record["row"], self.on_drift == "full"
        if self.on_drift != "stop":
            how = "at full depth" if self.full_depth else "with exits"
            warnings.warn(f"{self._finding()}; the run goes on {how}.", stacklevel=2)

    def check(self) -> None:
        """Raises a BudgetRefutedError if the run is to stop."""
        if self.refuted_at is not None and self.on_drift == "stop":
            raise BudgetRefutedError(
                f"{self._finding()}. The rows up to there are kept; look at those with `changed`, and go on with "
                '`on_drift="full"` (`--on-drift full`), or calibrate on images like these.'
            )

    def _finding(self) -> str:
        return (
            f"the budget of {self.budget:.4g} changed outputs is refuted after row {self.refuted_at}: "
            f"{self.changed} of {self.rows} audited rows are others at full depth"
        )

    def summary(self) -> dict[str, Any]:
        """
        What the rows so far say: "share" and "seed"; "rows" that were audited and those "changed"; their
        "changed_share" with its 95 % "interval", see [`share_interval`] (None and [0, 1] without rows); the "budget"
        (None without one) and the row "refuted_at" (None if it is not).
        """
        return {
            **self.settings,
            "rows": self.rows,
            "changed": self.changed,
            "changed_share": self.changed / self.rows if self.rows else None,
            "interval": list(share_interval(self.changed, self.rows)),
            "budget": self.budget,
            "refuted_at": self.refuted_at,
        }


def promised_budget(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    task: str,
    options: Mapping[str, Any],
    answers: Sequence[str] | None = None,
) -> float | None:
    """
    The share of changed outputs that the chosen preset promises for a run, None without a promise.

    There is none if the preset is about lost quality or compute, or about the expectation over calibrations, which one
    run cannot refute; if it was calibrated for another task, prompt, answers, dtype or options of `generate`; or if
    there are exit options beside it.

    Args:
        model, processor: with the presets in its generation config, and the answers that they were calibrated on.
        task (`str`), options (`dict`), answers (sequence of `str`, *optional*): see [`bulk_rows`].
    """
    preset = chosen_preset(options, {}, exit_attributes(model.generation_config))
    asked = {name: value for name, value in options.items() if value is not None}
    # A row of bulk work has one caption as a matter of course.
    others = {name: asked[name] for name in asked.keys() - CONFIG_NAMES - {"num_return_sequences"}}
    config = deepcopy(model.generation_config)
    config.update(**others)
    if certified := preset.get("certified_for"):
        # an option that was not given then has the checkpoint's own value
        same = others.keys() <= certified.keys() and not other_settings(preset, config, model.dtype)
    else:
        same = preset.get("generation", {}) == others
    kept = (
        preset.get("risk") == "disagreement"
        and preset.get("guarantee", "confidence") == "confidence"
        and preset.get("task") == task
        and preset.get("prompt_type", "prev_output") == "prev_output"
        and same
        and asked.keys() & CONFIG_NAMES <= {"exit_preset"}
        and (answers is None or sorted(answers) == sorted(processor.entailment_answers.values()))
    )
    return preset.get("budget") if kept else None


__all__ = ["AUDIT_COLUMNS", "REACTIONS", "Audit", "BudgetRefutedError", "promised_budget"]
