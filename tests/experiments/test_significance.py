import math

import numpy as np
import pytest

from experiments.significance import compare, holm, incomplete_beta, p_value, quantile, welch

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # Gauss's rule on -1..1


def p_by_integration(t, freedom):
    """p_value in another way: with t = sqrt(freedom) tan(angle), Student's density is a power of
    the cosine, which is integrated."""
    def integral(end):
        return (np.cos((NODES + 1) * end / 2) ** (freedom - 1) * WEIGHTS).sum() * end / 2

    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2) / 2
    return 1 - integral(math.atan(abs(t) / math.sqrt(freedom))) / whole


# From printed tables of Student's t: two-sided 95 % and 99 % points.
@pytest.mark.parametrize("freedom, t95, t99", [
    (1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032),
    (8, 2.306, 3.355), (30, 2.042, 2.750), (120, 1.980, 2.617)])
def test_quantiles_are_those_of_printed_tables(freedom, t95, t99):
    assert quantile(freedom) == pytest.approx(t95, abs=6e-4)
    assert quantile(freedom, 0.01) == pytest.approx(t99, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 1.5, 2.3, 3.999, 7.1, 40.5])
def test_degrees_of_freedom_need_not_be_whole(freedom):
    for t in (0, 0.01, 0.7, 1, -2.5, 4, 30):
        assert p_value(t, freedom) == pytest.approx(p_by_integration(t, freedom), abs=1e-10)
    assert p_value(quantile(freedom), freedom) == pytest.approx(0.05, abs=1e-9)


def test_with_1_and_2_degrees_of_freedom_there_are_formulas():
    for t in (0.3, 3, 300):
        assert p_value(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
        assert p_value(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert incomplete_beta(0.0, 2, 3) == 0 and incomplete_beta(1.0, 2, 3) == 1


@pytest.mark.parametrize("better, worse, error, freedom", [
    ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], math.sqrt(2e-4 / 3), 4),
    # All variance on one side leaves 2 degrees of freedom, nearly all 2.6.
    ([0.82, 0.82, 0.82], [0.70, 0.74, 0.78], math.sqrt(16e-4 / 3), 2),
    ([0.814, 0.83, 0.846], [0.70, 0.74, 0.78], math.sqrt(18.56e-4 / 3), 2.62404),
    # Each side has its own number of values.
    ([0.51, 0.51], [0.40, 0.45, 0.50, 0.45, 0.45], math.sqrt(1.25e-3 / 5), 4),
    ([0.4, 0.6], [0.1, 0.2, 0.3, 0.4], math.sqrt(0.01 + 0.05 / 12), 1.89716),
    ([0.5, 0.5], [0.4, 0.4], 0, 2),
])
def test_welch_gives_each_side_a_variance_of_its_own(better, worse, error, freedom):
    difference, found_error, found_freedom = welch(better, worse)
    assert difference == pytest.approx(sum(better) / len(better) - sum(worse) / len(worse))
    assert found_error == pytest.approx(error, abs=1e-9)
    assert found_freedom == pytest.approx(freedom, abs=1e-4)


def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match="single"):
        welch([0.5], [0.4, 0.3])


def test_an_interval_excludes_0_where_p_is_below_5_percent():
    for step in np.linspace(0, 0.1, 41):
        worse = [0.81 - step, 0.79 - step, 0.80 - step]
        difference, low, high, p = compare([0.80, 0.81, 0.83], worse)
        assert low < difference < high and (low > 0 or high < 0) == (p < 0.05)
    assert compare([0.5, 0.5], [0.4, 0.4])[1:] == (pytest.approx(0.1), pytest.approx(0.1), 0)
    assert compare([0.5, 0.5], [0.5, 0.5]) == (0, 0, 0, 1)


@pytest.mark.parametrize("p_values, clear", [
    ([0.04], [True]), ([0.06], [False]), ([], []),
    ([0.04, 0.03], [False, False]),  # the smaller one would have to be below 0.025
    ([0.04, 0.02], [True, True]),
    ([0.03, 0.01, 0.02], [True, True, True]),
    ([0.001, 0.03, 0.2, 0.016], [True, False, False, True]),
    ([0.001, 0.018, 0.018, 0.2], [True, False, False, False]),  # no larger one is clear either
])
def test_holm_asks_most_of_the_smallest_p_value(p_values, clear):
    assert holm(p_values) == clear
