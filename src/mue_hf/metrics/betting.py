"""What outcomes that come one by one, changed or not, say about the share of changes, at every moment.

A gambler who bets on outcomes of a stream gains nothing in expectation while a hypothesis is true, whatever the bets,
so capital of 1 ever grows to 1 / delta with a probability of at most delta (Ville's inequality). Unlike bounds for a
fixed number of units, this holds at all times together: one may look after every outcome, and stop whenever one likes.
After Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", arXiv 2010.09686.
"""

from math import lgamma, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Halvings of an interval until its end is known to double precision.
BISECTIONS = 53
# Alternatives that are bet on: shares between the budget and 1.
BETS = 12
# After row n one part in n + SLOWNESS of the capital is spread anew.
SLOWNESS = 100


def share_interval(changed: int, rows: int, delta: float = 0.05) -> tuple[float, float]:
    """Both ends of an interval of the chance of a change, after `changed` of `rows` independent rows.

    A confidence sequence: with a probability of at least 1 - `delta` the intervals after each row hold the chance,
    all of them. It is made of the shares against which a gambler who expects (changed + 1/2) / (rows + 1) at every
    row, of what came before it, has less than 1 / delta.

    Raises:
        ValueError: if there are more changes than rows, or `delta` is not in (0, 1).
    """
    if not 0 <= changed <= rows:
        raise ValueError(
            f"`changed` must be from 0 to `rows`, got {changed} of {rows}; count both over the same rows."
        )
    _check_probability("delta", delta)
    if not rows:
        return 0.0, 1.0
    same, share = rows - changed, changed / rows
    # Beta functions: the mean likelihood under the prior Beta(1/2, 1/2), in which such a gambler's bets end.
    won = lgamma(changed + 0.5) + lgamma(same + 0.5) - lgamma(rows + 1) - 2 * lgamma(0.5)

    def excluded(chance: float) -> bool:
        likelihood = (changed and changed * log(chance)) + (same and same * log(1 - chance))
        return won - likelihood >= log(1 / delta)

    def end(inside: float, outside: float) -> float:
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
        return outside

    return end(share, 0.0) if changed else 0.0, end(share, 1.0) if same else 1.0


class BudgetTest:
    """A test, after every row, of the promise that each row changes with a chance of at most `budget`.

    Where the promise holds, `refuted` ever becomes true with a probability of at most `delta`, however long the stream
    is and however the chance varies below the budget. One half of the capital does not bet, the other is spread
    over bets on larger shares. A part of it, which shrinks with time, is spread anew after each row (the fixed share
    of Herbster and Warmuth, 1998), so that a stream that breaks its promise late is found out too.

    Args:
        budget (`float`): the promised share of changes, in (0, 1).
        delta (`float`): probability of a false alarm, in (0, 1).
        streams (`tuple[int, ...]`): shape of independent streams that are watched at once; one by default.

    Raises:
        ValueError: if a number is not in (0, 1).
    """

    def __init__(self, budget: float, delta: float = 0.05, streams: tuple[int, ...] = ()) -> None:
        _check_probability("budget", budget)
        _check_probability("delta", delta)
        self.budget, self.delta, self.rows = budget, delta, 0
        # The last one is the budget itself: it does not bet.
        shares = budget ** (np.arange(1, BETS + 1) / BETS)
        self._bets = (shares - budget) / (budget * (1 - budget))
        self._prior: NDArray[np.float64] = np.append(np.full(BETS - 1, 0.5 / (BETS - 1)), 0.5)
        self._spread = np.broadcast_to(self._prior, (*streams, BETS))
        self.log_capital = np.zeros(streams)
        self.refuted: NDArray[np.bool_] = np.zeros(streams, dtype=bool)

    def update(self, changed: ArrayLike) -> NDArray[np.bool_]:
        """Counts a row, changed or not, of each stream: bool [streams]. Returns `refuted`, of which none is undone."""
        won = self._spread * (1 + self._bets * (np.asarray(changed, dtype=np.float64)[..., None] - self.budget))
        total = won.sum(-1, keepdims=True)
        self.log_capital = self.log_capital + np.log(total[..., 0])
        self.rows += 1
        moved = 1 / (self.rows + SLOWNESS)
        self._spread = (1 - moved) * won / total + moved * self._prior
        self.refuted = self.refuted | (self.log_capital >= log(1 / self.delta))
        return self.refuted


def _check_probability(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"`{name}` must be above 0 and below 1, got {value}; choose such as 0.05.")


__all__ = ["BudgetTest", "share_interval"]
