"""Bounds of calibration: they hold as often as they promise, agree with exact tails, and move the right way."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mue_hf.calibration.bounds import (
    METHODS,
    binomial_tail,
    fixed_sequence,
    risk_pvalue,
    risk_upper_bound,
    rounded_up,
    smallest_budget,
)

both_methods = pytest.mark.parametrize("method", METHODS)
samples = st.lists(st.floats(0, 1), min_size=1, max_size=60)
probabilities = st.floats(0.001, 0.999)

# At delta 0.05 more than 20 failures of 200 have probability .001.
DRAWS, ALLOWED = 200, 20


def bernoulli(rng: np.random.Generator, mean: float, units: int) -> np.ndarray:
    return (rng.random(units) < mean).astype(float)


def beta(rng: np.random.Generator, mean: float, units: int) -> np.ndarray:
    return rng.beta(5 * mean, 5 * (1 - mean), units)


def three_values(rng: np.random.Generator, mean: float, units: int) -> np.ndarray:
    """0, 1/2 or 1, such as the mean of two outputs per image."""
    return (bernoulli(rng, mean, units) + bernoulli(rng, mean, units)) / 2


@both_methods
@pytest.mark.parametrize("mean", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("draw", [bernoulli, beta, three_values])
def test_bound_fails_no_more_often_than_it_promises(draw, mean, method):
    rng = np.random.default_rng(0)
    # At the true mean the test may reject in at most delta of the draws: then the bound lies below it.
    failures = sum(risk_pvalue(draw(rng, mean, 120), mean, 0.05, method) <= 0.05 for _ in range(DRAWS))
    assert failures <= ALLOWED


@both_methods
def test_fixed_sequence_certifies_a_false_candidate_no_more_often_than_it_promises(method):
    rng, budget = np.random.default_rng(1), 0.1
    # From safest to fastest; the last three are above the budget, the first of them just so.
    risks = [0.01, 0.03, 0.06, 0.1001, 0.15, 0.3]
    failures, certified = 0, []
    for _ in range(DRAWS):
        pvalues = (risk_pvalue(bernoulli(rng, risk, 300), budget, 0.05, method) for risk in risks)
        certified.append(fixed_sequence(pvalues, 0.05))
        failures += certified[-1] > 3
    assert failures <= ALLOWED
    # And it is no idle promise: the second candidate is nearly always found.
    assert np.quantile(certified, 0.05) >= 2


@both_methods
@given(losses=samples, risks=st.tuples(probabilities, probabilities))
def test_pvalue_never_rises_with_the_risk(method, losses, risks):
    low, high = sorted(risks)
    assert risk_pvalue(losses, high, 0.05, method) <= risk_pvalue(losses, low, 0.05, method) + 1e-12


@both_methods
@given(losses=samples, delta=st.floats(0.01, 0.5))
def test_bound_is_where_the_pvalue_reaches_delta(method, losses, delta):
    bound = risk_upper_bound(losses, delta, method)
    if bound < 1:
        assert risk_pvalue(losses, bound, delta, method) <= delta
    if 1e-6 < bound:
        assert risk_pvalue(losses, bound - 1e-6, delta, method) > delta


class TestHoeffdingBentkus:
    # Bets depend on losses and delta, so these are laws of this method alone.
    @given(losses=samples, delta=st.floats(0.01, 0.5), shares=st.data())
    def test_bound_rises_with_losses_and_confidence(self, losses, delta, shares):
        bound = risk_upper_bound(losses, delta)
        lower = [loss * shares.draw(st.floats(0, 1)) for loss in losses]
        assert np.mean(losses) <= bound + 1e-9
        assert risk_upper_bound(lower, delta) <= bound + 1e-9
        assert risk_upper_bound(losses, delta / 2) >= bound - 1e-9

    @pytest.mark.parametrize("trials", [1, 7, 300, 5000])
    @pytest.mark.parametrize("probability", [1e-4, 0.05, 0.5, 0.98])
    def test_tail_is_scipys(self, trials, probability):
        stats = pytest.importorskip("scipy.stats")
        for successes in {0, trials // 20, trials // 2, trials - 1, trials}:
            expected = stats.binom.cdf(successes, trials, probability)
            assert binomial_tail(successes, trials, probability) == pytest.approx(expected, rel=1e-9, abs=1e-300)

    @pytest.mark.parametrize("failures", [0, 3, 20])
    def test_never_beats_the_exact_binomial_test_by_more_than_it_may(self, failures):
        """For losses of 0 and 1 the exact test is the best there is, and Bentkus' bound is e times its tail."""
        stats = pytest.importorskip("scipy.stats")
        losses = np.arange(400) < failures
        exact = stats.binom.cdf(failures, 400, 0.1)
        assert exact * (1 - 1e-9) <= risk_pvalue(losses, 0.1) <= np.e * exact * (1 + 1e-9)

    def test_hoeffding_part_by_hand(self):
        # Four losses of 1/4 against 1/2: n (1/4 log 1/2 + 3/4 log 3/2); the binomial tail times e is larger.
        expected = np.exp(-4 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5)))
        assert risk_pvalue([0.25] * 4, 0.5) == pytest.approx(expected)

    def test_fractions_that_make_a_whole_number_are_counted_as_that(self):
        assert sum([0.1] * 30) > 3
        assert risk_pvalue([0.1] * 30, 0.9) <= np.e * binomial_tail(3, 30, 0.9)

    @pytest.mark.parametrize("units", [1, 59, 2000])
    def test_smallest_budget_in_closed_form(self, units):
        assert smallest_budget(units, 0.05) == pytest.approx(1 - 0.05 ** (1 / units))


class TestBetting:
    def test_capital_by_hand(self):
        # Two units, delta e^-1: the first bet is min(1, sqrt(2 / (2 / 4))) = 1, the second 1 too.
        losses, delta = [0.0, 0.5], np.exp(-1)
        assert risk_pvalue(losses, 0.4, delta, "betting") == pytest.approx(1 / (1.4 * max(1, 0.9)))

    def test_gains_from_small_variance(self):
        losses = np.random.default_rng(0).uniform(0.08, 0.12, 500)
        assert risk_upper_bound(losses, method="betting") < 0.12 < risk_upper_bound(losses) < 0.15

    @pytest.mark.parametrize("units", [50, 500])
    def test_smallest_budget_is_close_to_the_best_possible(self, units):
        best = smallest_budget(units)
        assert best < smallest_budget(units, method="betting") < 1.1 * best


@both_methods
def test_smallest_budget_shrinks_with_the_sample(method):
    budgets = [smallest_budget(units, method=method) for units in (1, 2, 10, 100, 1000)]
    assert budgets == sorted(budgets, reverse=True)


@both_methods
def test_losses_of_one_exclude_nothing(method):
    assert risk_upper_bound(np.ones(50), method=method) == 1.0
    assert risk_pvalue(np.ones(50), 0.999, method=method) == 1.0


class TestFixedSequence:
    def test_stops_at_the_first_failure_and_asks_for_no_more(self):
        def pvalues() -> Iterator[float]:
            yield from [0.001, 0.05, 0.051]
            pytest.fail("the model must not run for candidates after the first failure")

        assert fixed_sequence(pvalues(), 0.05) == 2

    @pytest.mark.parametrize(("pvalues", "certified"), [([], 0), ([0.2, 0.0], 0), ([0.0, 0.01], 2)])
    def test_counts_from_the_first_on(self, pvalues, certified):
        assert fixed_sequence(pvalues) == certified

    def test_refuses_what_is_no_probability(self):
        with pytest.raises(ValueError, match=r"`pvalues\[1\]` must be in \[0, 1\], got nan"):
            fixed_sequence([0.0, float("nan")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"losses": []}, "`losses` must be one number per unit", id="empty"),
        pytest.param({"losses": [[0.1]]}, r"got shape \(1, 1\)", id="two-dimensional"),
        pytest.param({"losses": [0.1, 1.2]}, r"must be in \[0, 1\], got values from 0.1 to 1.2", id="above-one"),
        pytest.param({"losses": [0.1, float("nan")]}, r"must be in \[0, 1\]", id="nan"),
        pytest.param({"risk": 0.0}, "`risk` must be above 0 and below 1, got 0.0", id="risk"),
        pytest.param({"delta": 1.0}, "`delta` must be above 0 and below 1, got 1.0", id="delta"),
        pytest.param({"method": "clt"}, "`method` must be one of .*'clt'", id="method"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        risk_pvalue(**{"losses": [0.0], "risk": 0.1, "delta": 0.05} | arguments)


def test_an_empty_sample_has_no_budget():
    with pytest.raises(ValueError, match="`units` must be at least 1, got 0"):
        smallest_budget(0)


@given(st.floats(1e-6, 1.0))
def test_published_bounds_are_no_smaller_than_they_are(value):
    assert value * (1 - 1e-9) <= rounded_up(value) <= 1.0101 * value


def test_published_bounds_keep_what_has_three_digits():
    assert [rounded_up(value) for value in (0.05, 0.07, 0.05511, 0.123, 1.0)] == [0.05, 0.07, 0.0552, 0.123, 1.0]
