"""Is the difference of two means clear? Welch's t-test, its interval, and Holm's correction.

    difference, low, high, p = compare([0.61, 0.64, 0.67], [0.52, 0.55, 0.49])
    holm([p, 0.04, 0.03])                    # which are clear, if three differences are looked at

Seeds are few, so the degrees of freedom matter: 2.3 of them are not 2. They need not be whole.
"""

import math
import statistics


def incomplete_beta(x, a, b, terms=100):
    """Regularized incomplete beta function I_x(a, b): a continued fraction, DLMF 8.17.22."""
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1 - incomplete_beta(1 - x, b, a)
    if x <= 0:
        return 0.0
    fraction = 1.0
    for n in range(terms, 0, -1):  # 1 + d_1 / (1 + d_2 / (1 + ...)), from its far end
        m = n // 2
        d = (-(a + m) * (a + b + m) if n % 2 else m * (b - m)) * x / ((a + n - 1) * (a + n))
        fraction = 1 + d / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * fraction)


def p_value(t, freedom):
    """How often |T| exceeds |t|, if T follows Student's distribution: two-sided, 0..1."""
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5) if t else 1.0


def quantile(freedom, level=0.05):
    """The t that |T| exceeds with probability `level`: the inverse of p_value, by bisection."""
    low, high = 0.0, 1.0
    while p_value(high, freedom) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > level else (low, middle)
    return high


def welch(better, worse):
    """-> difference of the means, its standard error, degrees of freedom (Welch, Satterthwaite).

    Each side, a list of two values or more, has its own variance. Raises ValueError for fewer.
    """
    n, m = len(better), len(worse)
    if min(n, m) < 2:
        raise ValueError("a single value has no variance")
    difference = statistics.mean(better) - statistics.mean(worse)
    a, b = statistics.variance(better) / n, statistics.variance(worse) / m
    if a + b == 0:
        return difference, 0.0, float(n + m - 2)
    # If one side has all of the variance, only its values count.
    freedom = (a + b) ** 2 / (a ** 2 / (n - 1) + b ** 2 / (m - 1))
    return difference, math.sqrt(a + b), freedom


def compare(better, worse):
    """-> difference of the means, the ends of its 95 % interval, and how often chance alone would
    give as large a difference (p-value). Raises ValueError for fewer than two values."""
    difference, error, freedom = welch(better, worse)
    half = quantile(freedom) * error
    p = p_value(difference / error, freedom) if error else float(difference == 0)
    return difference, difference - half, difference + half, p


def holm(p_values, level=0.05):
    """Which of several tests are clear: the chance that any of them is so by chance alone is at
    most `level` (Holm 1979). -> list of bools."""
    clear = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for k, i in enumerate(order):
        if p_values[i] > level / (len(order) - k):
            break  # and so is no larger one
        clear[i] = True
    return clear
