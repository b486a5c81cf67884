"""Bets on a share of changes: intervals that hold at every moment, and a test that rarely gives a false alarm."""

import math

import numpy as np
import pytest

from mue_hf.metrics.betting import BudgetTest, share_interval


def capital(outcomes, share):
    """That of a gambler, row by row, who bets against `share` on what the rows before make likely."""
    wealth, changed = 1.0, 0
    for rows, outcome in enumerate(outcomes):
        expected = (changed + 0.5) / (rows + 1)
        wealth *= 1 + (expected - share) / (share * (1 - share)) * (outcome - share)
        changed += outcome
    return wealth


class TestInterval:
    @pytest.mark.parametrize("outcomes", [[0, 1, 0, 0, 1, 0, 0], [1] * 5, [0] * 9, [1, 0] * 30], ids=str)
    def test_ends_are_where_the_gambler_has_won_enough(self, outcomes):
        low, high = share_interval(sum(outcomes), len(outcomes), 0.1)
        assert 0 <= low <= np.mean(outcomes) <= high <= 1
        for end, inwards in ((low, 1e-6), (high, -1e-6)):
            if 0 < end < 1:
                assert capital(outcomes, end) == pytest.approx(10, rel=1e-6)
                assert capital(outcomes, end + inwards) < 10 < capital(outcomes, end - inwards)

    def test_order_does_not_matter_and_rows_narrow_it(self):
        assert capital([1, 0, 0, 1, 0], 0.2) == pytest.approx(capital([0, 0, 0, 1, 1], 0.2))
        widths = [high - low for low, high in (share_interval(n // 10, n) for n in (10, 100, 1000, 10**6))]
        assert widths == sorted(widths, reverse=True) and widths[-1] < 0.01

    def test_ends_of_the_range(self):
        assert share_interval(0, 0) == (0.0, 1.0)
        assert share_interval(0, 50)[0] == 0.0 and share_interval(50, 50)[1] == 1.0
        assert share_interval(0, 50)[1] == pytest.approx(1 - share_interval(50, 50)[0])

    def test_holds_at_all_times_together(self):
        """In 200 streams of 300 rows, the share of those of which some interval misses the chance."""
        rng, chance, missed = np.random.default_rng(0), 0.1, np.zeros(200, dtype=bool)
        counts = (rng.random((200, 300)) < chance).cumsum(1)
        for rows in range(1, 301):
            inside = {}
            for count in np.unique(counts[:, rows - 1]):
                low, high = share_interval(int(count), rows)
                inside[count] = low <= chance <= high
            missed |= ~np.array([inside[count] for count in counts[:, rows - 1]])
        assert missed.mean() <= 0.05

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, 2), "`changed` must be from 0 to `rows`"),
            ((-1, 2), "`changed`"),
            ((1, 2, 1.0), "`delta` must be above"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            share_interval(*arguments)


def refuted_after(budget, chances, streams, seed=0):
    """After how many rows each stream was refuted, infinity for never."""
    rng, test, after = np.random.default_rng(seed), BudgetTest(budget, streams=(streams,)), np.full(streams, math.inf)
    for row, chance in enumerate(chances, 1):
        before = test.refuted
        after[test.update(rng.random(streams) < chance) & ~before] = row
    return after


class TestBudget:
    def test_false_alarms(self):
        """200 streams that change exactly as often as is allowed; `benchmarks/audit_alarms.py` has more and longer
        ones."""
        assert np.isfinite(refuted_after(0.05, [0.05] * 1500, 200)).mean() <= 0.05

    def test_four_times_the_budget_is_refuted_within_300_rows(self):
        assert (refuted_after(0.05, [0.2] * 300, 200) <= 300).mean() >= 0.95

    def test_a_late_break_is_found_out(self):
        """After 2,000 rows that change half as often as they may; by the share of all rows there would be no reason
        for an alarm."""
        after = refuted_after(0.05, [0.025] * 2000 + [0.2] * 250, 100)
        assert (after > 2000).mean() >= 0.95 and (after <= 2250).mean() >= 0.95

    def test_bets_are_fair(self):
        """The expected capital after any row is that before it where a row changes with the chance of the budget, and
        no more where it does with a smaller one."""
        for start in ((0, 0, 1, 0), (1, 1, 0), ()):
            tests = {outcome: BudgetTest(0.2) for outcome in (0, 1)}
            for outcome, test in tests.items():
                for one in (*start, outcome):
                    before = np.exp(test.log_capital)
                    test.update(one)
            after = {outcome: np.exp(test.log_capital) for outcome, test in tests.items()}
            assert 0.2 * after[1] + 0.8 * after[0] == pytest.approx(before)
            assert 0.1 * after[1] + 0.9 * after[0] <= before

    def test_streams_are_watched_apart(self):
        outcomes = np.random.default_rng(1).random((60, 3)) < [0.05, 0.2, 0.9]
        together, alone = BudgetTest(0.05, streams=(3,)), [BudgetTest(0.05) for _ in range(3)]
        for row in outcomes:
            refuted = together.update(row)
            assert refuted.tolist() == [bool(test.update(one)) for test, one in zip(alone, row, strict=True)]
        assert together.log_capital == pytest.approx(np.array([test.log_capital for test in alone]))
        assert refuted[2] and not refuted[0]

    @pytest.mark.parametrize("arguments", [(0.0,), (1.0,), (0.05, 0.0)])
    def test_bad_arguments(self, arguments):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            BudgetTest(*arguments)
