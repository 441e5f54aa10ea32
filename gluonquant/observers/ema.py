"""Exponential moving average of batch extremes (Jacob et al. 2018, arXiv:1712.05877)."""
import math

from .base import Observer, _observers


@_observers.register('ema')
class EMAObserver(Observer):
    """Moving average of each batch's extremes; the first batch sets it.   a = d * a + (1 - d) * max|batch|

    On an unsigned grid max(max(batch), 0) replaces max|batch|. While ``a`` is still 0 (nothing but zeros
    came) the next batch sets it, as in training. ``affine_range`` averages batch minimum and batch maximum
    each on its own; there the very first batch sets, zeros or not.

    Parameters
    ----------
    decay : float in [0, 1), default 0.99
        d, the weight of the past. 0 keeps the last batch only.

    Raises
    ------
    ValueError
        ``decay`` is outside [0, 1).

    References
    ----------
    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", arXiv:1712.05877, section 3.1.
    """

    def __init__(self, decay=0.99):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f'decay={decay!r} is outside [0, 1): pass the weight of the past, e.g. 0.99')
        self.decay = decay
        self._signed_amax = 0.0
        self._unsigned_amax = 0.0
        self._ema_lo = math.nan
        self._ema_hi = math.nan

    def _collect(self, values):
        lo, hi = float(values.min()), float(values.max())
        first = self.batches == 0
        self._signed_amax = self._follow(self._signed_amax, max(abs(lo), abs(hi)), self._signed_amax == 0)
        self._unsigned_amax = self._follow(self._unsigned_amax, max(hi, 0.0), self._unsigned_amax == 0)
        self._ema_lo = self._follow(self._ema_lo, lo, first)
        self._ema_hi = self._follow(self._ema_hi, hi, first)

    def _follow(self, old, new, unset):
        return new if unset else self.decay * old + (1 - self.decay) * new

    def _amax(self, grid):
        return self._signed_amax if grid.signed else self._unsigned_amax

    def affine_range(self):
        """Moving averages of batch minimum and batch maximum; see :meth:`Observer.affine_range`."""
        self._require_data()
        return self._ema_lo, self._ema_hi
