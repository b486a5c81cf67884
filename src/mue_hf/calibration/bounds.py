"""Statistics of calibration: what losses in [0, 1] of independent units (images) say about their true mean.

Where the p-value of the hypothesis that it is above the allowed risk is at most delta, the risk is certified with
confidence 1 - delta. All functions raise a ValueError where an argument is out of its range.
"""

from collections.abc import Iterable
from math import ceil, e, fsum, log, log1p

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.intervals import rounded_up

# Halvings of [0, 1] until the bound is known to double precision.
BISECTIONS = 53


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(X <= successes) for X binomial with `trials` and `probability` in (0, 1), summed in logarithms."""
    if successes >= trials:
        return 1.0
    steps = np.arange(successes)
    ratios = np.log((trials - steps) / (steps + 1)) + log(probability) - log1p(-probability)
    terms = trials * log1p(-probability) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(float(np.exp(np.logaddexp.reduce(terms))), 1.0)


def _hoeffding_bentkus(losses: NDArray, risk: float, delta: float) -> float:
    units = len(losses)
    # The exact sum, so that rounding never lifts the count of a whole number of failures by one.
    total = fsum(losses)
    mean = total / units
    if mean >= risk:
        return 1.0
    # Kullback-Leibler divergence of Bernoulli(mean) from Bernoulli(risk)
    divergence = (mean * log(mean / risk) if mean else 0.0) + (1 - mean) * (log1p(-mean) - log1p(-risk))
    hoeffding = float(np.exp(-units * divergence))
    return min(hoeffding, e * binomial_tail(ceil(total), units, risk), 1.0)


def _betting(losses: NDArray, risk: float, delta: float) -> float:
    units = len(losses)
    counts = np.arange(2, units + 2)
    means = (0.5 + np.cumsum(losses)) / counts
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / counts
    # Each bet knows only the losses before it.
    known = np.concatenate([[0.25], variances[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * log(1 / delta) / (units * known)))
    # The best moment to stop may be any of them, the start included.
    richest = max(0.0, float(np.max(np.cumsum(np.log1p(-bets * (losses - risk))))))
    return float(np.exp(-richest))


METHODS = {"hoeffding-bentkus": _hoeffding_bentkus, "betting": _betting}


def risk_pvalue(losses: ArrayLike, risk: float, delta: float = 0.05, method: str = "hoeffding-bentkus") -> float:
    """P-value of the hypothesis that the mean loss is above `risk`.

    Args:
        losses (array [units]): independent losses of one distribution on [0, 1].
        risk (`float`): the allowed mean loss, in (0, 1).
        delta (`float`): probability of a false certificate, in (0, 1); the size of the bets.
        method (`str`): a test, valid at every sample size. "hoeffding-bentkus": the smaller one of Hoeffding's bound
            in its relative-entropy form and of Bentkus' bound, e times a binomial tail, which depend on the mean alone
            (Bates et al., arXiv 2101.02703, section 3.1; Angelopoulos et al., "Learn then Test", arXiv 2110.01052).
            "betting": the capital of a gambler who bets on losses below `risk`, which gains from a small variance
            (Waudby-Smith and Ramdas, arXiv 2010.09686; with the bets of Bates et al.). It depends on the order of the
            losses, which must not depend on their values: shuffle them where files are sorted by difficulty.

    Returns:
        `float`: in [0, 1], never rising with `risk`.
    """
    check_share("risk", risk)
    losses = _checked(losses, delta, method)
    return METHODS[method](losses, risk, delta)


def risk_upper_bound(losses: ArrayLike, delta: float = 0.05, method: str = "hoeffding-bentkus") -> float:
    """The smallest risk in (0, 1] that `losses` certify, 1 where they exclude nothing; see [`risk_pvalue`]."""
    losses = _checked(losses, delta, method)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # Rounding can end the halving early at 0 or 1, where there is nothing to test.
        if not 0.0 < middle < 1.0:
            break
        if METHODS[method](losses, middle, delta) <= delta:
            high = middle
        else:
            low = middle
    return high


def smallest_budget(units: int, delta: float = 0.05, method: str = "hoeffding-bentkus") -> float:
    """The smallest risk that so many losses, all of them 0, could certify: for "hoeffding-bentkus"
    1 - delta ** (1 / units), about 3 / units at delta = 0.05."""
    if units < 1:
        raise ValueError(f"`units` must be at least 1, got {units}; an empty sample certifies nothing.")
    return risk_upper_bound(np.zeros(units), delta, method)


def expected_loss_bound(losses: ArrayLike) -> float:
    """(n R + 1) / (n + 1), for the mean R of n `losses` in [0, 1].

    Where the losses of a row of settings never fall from one setting to the next, the last setting for which this is
    at most a risk has an expected loss within that risk, over draws of the losses and of one more of the same
    distribution (Angelopoulos et al., "Conformal Risk Control", ICLR 2024, theorem 1).
    """
    losses = _checked(losses)
    return (fsum(losses) + 1.0) / (len(losses) + 1)


def fixed_sequence(pvalues: Iterable[float], delta: float = 0.05) -> int:
    """How many candidates, from the first on, are certified together with confidence 1 - `delta`: those before the
    first that fails (fixed-sequence testing in "Learn then Test", arXiv 2110.01052).

    Args:
        pvalues (iterable of `float`): one per candidate, in an order, best from safest to fastest, that does not
            depend on the data behind them. It is read until the first failure: a generator can run the model.
        delta (`float`): probability that any certificate is false, in (0, 1).
    """
    check_share("delta", delta)
    certified = 0
    for pvalue in pvalues:
        if not 0.0 <= pvalue <= 1.0:
            raise ValueError(f"`pvalues[{certified}]` must be in [0, 1], got {pvalue}; pass those of `risk_pvalue`.")
        if pvalue > delta:
            break
        certified += 1
    return certified


def _checked(losses: ArrayLike, delta: float = 0.05, method: str = "hoeffding-bentkus") -> NDArray:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 1 or not losses.size:
        raise ValueError(f"`losses` must be one number per unit, got shape {losses.shape}; average over each unit.")
    if not np.all((losses >= 0) & (losses <= 1)):
        found = f"{losses.min()} to {losses.max()}"
        raise ValueError(f"`losses` must be in [0, 1], got values from {found}; scale or clip them.")
    check_share("delta", delta)
    check_choice("method", method, METHODS)
    return losses


def check_share(name: str, value: float | None) -> None:
    """Raises a ValueError unless `value` is in (0, 1), or None."""
    if value is not None and not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` must be above 0 and below 1, got {value}; choose such as 0.05.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError unless `value` is known."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}; choose one of them.")


__all__ = [
    "METHODS",
    "check_choice",
    "check_share",
    "expected_loss_bound",
    "fixed_sequence",
    "risk_pvalue",
    "risk_upper_bound",
    "rounded_up",
    "smallest_budget",
]
