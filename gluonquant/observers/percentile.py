"""A percentile of the values, so that rare outliers do not set the range."""
import numpy as np

from .base import SamplingObserver, _observers


@_observers.register('percentile')
class PercentileObserver(SamplingObserver):
    """Percentile P of the sample, interpolated linearly between order statistics.

    Signed grids: of |x|. Unsigned grids: of x itself, negative values and zeros included, then floored at 0.
    ``affine_range``: percentiles 100 - P and P of x. P = 100 is the exact minimum and maximum, thinned sample
    or not.

    Parameters
    ----------
    percentile : float in (50, 100], default 99.9
        P.
    max_values : int or None, default 2**20
        See :class:`SamplingObserver`.

    Raises
    ------
    ValueError
        ``percentile`` is outside (50, 100], or ``max_values`` is no sample size.

    References
    ----------
    Li et al. 2019, "Fully Quantized Network for Object Detection", CVPR.
    """

    def __init__(self, percentile=99.9, max_values=2**20):
        super().__init__(max_values)
        if not 50 < percentile <= 100:
            raise ValueError(f'percentile={percentile!r} is outside (50, 100]: pass percent, e.g. 99.9, not '
                             '0.999')
        self.percentile = percentile

    def _amax(self, grid):
        if self.percentile == 100:
            return self._top(grid)
        values = np.abs(self.sample) if grid.signed else self.sample
        return max(np.percentile(values.astype(np.float64), self.percentile), 0.0)

    def affine_range(self):
        """Percentiles 100 - P and P of x; see :meth:`Observer.affine_range`."""
        self._require_data()
        if self.percentile == 100:
            return self.lo, self.hi
        lo, hi = np.percentile(self.sample.astype(np.float64), [100 - self.percentile, self.percentile])
        return float(lo), float(hi)
