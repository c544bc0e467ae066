"""Means over seeds: against closed cases and published quantiles."""

from itertools import product
from math import sqrt

import numpy as np
import pytest

from unigrpo_core.ablation.statistics import between, bootstrap, estimate, t_quantile


def test_mean_and_standard_error_by_hand():
    found = estimate([1.0, 2.0, 6.0])  # sd^2 = (4 + 1 + 9) / 2 = 7
    assert (found.n, found.mean, found.values) == (3, 3.0, (1.0, 2.0, 6.0))
    assert found.se == pytest.approx(sqrt(7 / 3))
    assert found.t == pytest.approx((3 - 4.3026527 * sqrt(7 / 3), 3 + 4.3026527 * sqrt(7 / 3)))


def test_one_value_has_no_uncertainty():
    found = estimate([0.25])
    assert (found.mean, found.se, found.bootstrap, found.t) == (0.25, None, None, None)


def test_equal_values_have_none_either_but_say_so():
    found = estimate([0.5] * 4)
    assert (found.se, found.bootstrap, found.t) == (0.0, (0.5, 0.5), (0.5, 0.5))


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # tables of the t distribution, two-sided 95 %
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157),
     (10, 2.228139), (30, 2.042272), (120, 1.979930), (1000, 1.962339), (3001, 1.960755)],
)  # fmt: skip
def test_t_quantiles(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-6)


def test_the_bootstrap_of_three_values_spans_what_they_span():
    """Each of the 27 resamples is as likely as another; the extremes (1/27 each) are more likely
    than 2.5 %, so the interval is from the smallest to the largest value."""
    assert bootstrap([0.3, 0.1, 0.2]) == pytest.approx((0.1, 0.3))


def test_the_bootstrap_agrees_with_all_resamples():
    values = [0.1, 0.2, 0.4, 0.8, 1.6]
    means = [sum(drawn) / 5 for drawn in product(values, repeat=5)]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap(values) == pytest.approx(expected, abs=0.05)
    assert bootstrap(values) == bootstrap(list(values))


def test_between_places():
    places, values = (0, 10, 30), (1.0, 2.0, 0.0)
    assert between(places, values, 0) == 1.0
    assert between(places, values, 10) == 2.0
    assert between(places, values, 30) == 0.0
    assert between(places, values, 5) == pytest.approx(1.5)
    assert between(places, values, 25) == pytest.approx(0.5)
    assert between(places, values, 30.001) is None
    assert between((5.0, 6.0), (1.0, 2.0), 4.9) is None
    assert between((5.0,), (1.0,), 5.0) == 1.0
