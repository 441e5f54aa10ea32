"""Calibration statistics: batches or values in, a range or a magnitude out, all float64.

The entropy method is that of TensorRT's 8-bit calibration (Migacz, GTC 2017).
"""
import numpy as np

from .common import EPS, double, round_half_even


def minmax(batches):
    """(lo, hi) over all batches; an empty batch is skipped."""
    batches = [double(b) for b in batches if np.size(b)]
    return min(b.min() for b in batches), max(b.max() for b in batches)


def ema(batches, decay=0.99):
    """(lo, hi): the first batch sets them, then value := decay * value + (1 - decay) * batch value, each on its own."""
    return _moving_average([double(b).min() for b in batches], decay), \
        _moving_average([double(b).max() for b in batches], decay)


def ema_amax(batches, decay=0.99, signed=True):
    """Moving average of max|x| (signed) or max(max x, 0) (unsigned); 0 counts as not set."""
    values = [np.abs(double(b)).max() if signed else max(double(b).max(), 0.0) for b in batches]
    return _moving_average(values, decay, unset=lambda value: value <= 0)


def _moving_average(values, decay, unset=lambda value: False):
    average = values[0]
    for value in values[1:]:
        average = value if unset(average) else decay * average + (1 - decay) * value
    return average


def percentile(values, P=99.9, signed=False):
    """P-th percentile of |x| (signed) or x (unsigned), interpolated linearly between order statistics."""
    ordered = np.sort((np.abs(double(values)) if signed else double(values)).reshape(-1))
    position = P / 100 * (ordered.size - 1)
    below = int(np.floor(position))
    above = min(below + 1, ordered.size - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def percentile_range(values, P=99.9):
    """(lo, hi): the percentiles 100 - P and P of x."""
    return percentile(values, 100 - P), percentile(values, P)


def mse(values, qmin, qmax):
    """The magnitude a = qmax * scale, out of 100 candidates, whose grid has the smallest squared error."""
    x = double(values)
    m = max(np.abs(x).max() if qmin < 0 else x.max(), EPS)
    candidates = m * (0.2 + 0.8 * np.arange(100) / 99)
    errors = []
    for a in candidates:
        scale = a / qmax
        errors.append(np.sum((np.clip(round_half_even(x / scale), qmin, qmax) * scale - x) ** 2))
    return candidates[np.argmin(errors)]                    # argmin returns the first minimum


def kl(values, bits, signed=False, bins=2048):
    """The magnitude whose clipped histogram loses the least information on the grid (Kullback-Leibler divergence)."""
    a = np.abs(double(values)).reshape(-1)
    if a.size == 0:
        return 0.0
    if a.max() == a.min():
        return a.max()
    H, edges = np.histogram(a, bins=bins, range=(0, a.max()))
    K = 2 ** (bits - 1) if signed else 2 ** bits            # Q + 1 magnitudes of the signed narrow grid, or all levels
    divergence = {i: _divergence(H.astype(np.float64), i, K) for i in range(K, bins + 1)}
    best = min(divergence, key=divergence.get)              # the first minimum
    return (best + 0.5) * (edges[1] - edges[0])


def _divergence(H, i, K):
    P = H[:i].copy()
    P[-1] += H[i:].sum()
    Qd = np.zeros(i)
    for run in np.array_split(np.arange(i), K):
        filled = run[H[run] > 0]
        Qd[filled] = H[run].sum() / max(filled.size, 1)
    if Qd.sum() == 0:
        return np.inf                                       # all mass lies beyond i
    P, Qd = P / P.sum(), Qd / Qd.sum()
    Qd[(Qd == 0) & (P > 0)] = 1e-4
    some = P > 0
    return np.sum(P[some] * np.log(P[some] / Qd[some]))
