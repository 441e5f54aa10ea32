"""The range that loses least information, by relative entropy of histograms (Migacz 2017)."""
import numpy as np

from .base import SamplingObserver, _observers

BINS = 2048
_EMPTY_MASS = 1e-4
_TIE = 1e-11  # divergences this close are equal but for rounding


def kl_bins(counts, groups):
    """Search how many bins of a histogram to keep.

    For i = K..len(H): P = H[0:i] with all mass beyond i added to its last bin; Q = H[0:i] cut into K runs,
    from bin ``k * i // K`` to ``(k + 1) * i // K``, each run's sum spread evenly over its non-empty bins;
    both normalised, then 1e-4 put where Q is empty and P is not. The i of least D = sum P * ln(P / Q) wins,
    the smallest among equals.

    Parameters
    ----------
    counts : ndarray of int, shape (n,)
        H, the histogram of magnitudes from zero up, not all zero.
    groups : int, 1 to n
        K, how many magnitudes the grid tells apart.

    Returns
    -------
    bins : int
        i, from K to n.
    """
    keep = np.arange(groups, len(counts) + 1)
    divergences = _divergences(counts.astype(np.float64), keep, groups)
    return int(keep[np.argmax(divergences <= divergences.min() + _TIE)])


def _divergences(h, keep, groups):
    """D for every number of bins in ``keep``, from cumulative sums: ln Q is the same all over a run.

    With n the total, C = sum H[0:i], t = n - C the mass beyond, S and N a run's sum and number of non-empty
    bins,
    n * D = sum_{j < i-1} H_j ln H_j + (H_last + t) ln(H_last + t) - n ln n
            - sum_runs S ln(S / (N C)) - t ln Q_last.
    """
    total = h.sum()
    mass = np.concatenate([[0], np.cumsum(h)])
    filled = np.concatenate([[0], np.cumsum(h > 0)])
    entropy = np.concatenate([[0], np.cumsum(_xlogy(h, h))])

    edges = np.arange(groups + 1) * keep[:, None] // groups
    run_mass = np.diff(mass[edges])
    run_level = run_mass / np.maximum(np.diff(filled[edges]), 1) / np.maximum(mass[keep], 1)[:, None]

    last = h[keep - 1]
    tail = total - mass[keep]
    last_level = np.where(last > 0, run_level[:, -1], _EMPTY_MASS)
    return (entropy[keep - 1] + _xlogy(last + tail, last + tail) - total * np.log(total)
            - _xlogy(run_mass, run_level).sum(axis=1) - _xlogy(tail, last_level)) / total


def _xlogy(x, y):
    """x * ln(y), 0 where x is 0."""
    return x * np.log(np.where(x > 0, y, 1))


@_observers.register('kl')
class KLObserver(SamplingObserver):
    """Range of least relative entropy between exact and coarsened values.   a = (i + 0.5) * m / 2048

    i comes from :func:`kl_bins` on a 2048-bin histogram of the sample over [0, m]: of |x| with m = max|x|
    for signed grids, of max(x, 0) with m = max(max x, 0) for unsigned ones. K is the number of magnitudes on
    the grid: qmax + 1, half of that if mid-rise.

    When all bins are kept, a exceeds m by half a bin (0.024 %). m itself is returned when all magnitudes are
    equal, and on grids that tell more magnitudes apart than there are bins. ``affine_range`` is the exact
    minimum and maximum.

    Parameters
    ----------
    max_values : int or None, default 2**20
        See :class:`SamplingObserver`.
    skip_zeros : bool, default False
        Leave values out of the histogram that are code 0 under every range: zeros, and negative ones on an
        unsigned grid. Set it for data behind a ReLU, whose heap of zeros otherwise rules D: spreading it
        over a run costs more than clipping, and i becomes far too small.

    References
    ----------
    Migacz 2017, "8-bit Inference with TensorRT", GPU Technology Conference.
    """

    def __init__(self, max_values=2**20, skip_zeros=False):
        super().__init__(max_values)
        self.skip_zeros = skip_zeros

    def _amax(self, grid):
        if grid.qmax < 1:
            raise ValueError(f'{grid} has no positive code to search a range for: pass bits >= 2, '
                             'signed=False or midrise=True')
        groups = (grid.qmax + 1) // 2 if grid.midrise else grid.qmax + 1
        top = self._top(grid)
        magnitudes = np.abs(self.sample) if grid.signed else np.maximum(self.sample, 0)
        if self.skip_zeros:
            magnitudes = magnitudes[magnitudes > 0]
        if groups > BINS or not magnitudes.size or magnitudes.min() == magnitudes.max():
            return top
        counts, _ = np.histogram(magnitudes.astype(np.float64), bins=BINS, range=(0, top))
        return (kl_bins(counts, groups) + 0.5) * top / BINS
