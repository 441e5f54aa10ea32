"""The range with the least squared quantization error, by search over shrink factors."""
import numpy as np

from .base import SamplingObserver, _as_float32, _observers

CANDIDATES = 100
_SMALLEST = 0.2  # of the full range
_EPS = 1e-8      # every range is floored here before it becomes a scale
_BLOCK = 2**15   # values worked on at a time: they stay in cache over all candidates


def mse_range(values, grid, amax=None):
    """Search the range of least squared error for one set of values.

    a_i = m * (0.2 + 0.8 * i / 99), i = 0..99, with m = max|x| (unsigned: max(max x, 0)); scale = a_i / qmax;
    codes as deployed: float32 x divided by float32 scale, rounded half to even and clipped; errors squared
    and summed in float64. The first minimum wins. Where m is below 1e-8 all candidates are one scale (ranges
    are floored there), and m is returned.

    Parameters
    ----------
    values : NDArray or ndarray
        Any shape, taken as float32.
    grid : Grid
    amax : float, optional
        m, where ``values`` are only a sample. Default: taken from ``values``.

    Returns
    -------
    lo, hi : float
        ``(-a, a)`` signed, ``(0, a)`` unsigned.

    Raises
    ------
    ValueError
        The grid has no positive code, some values are not finite, or ``values`` is empty and
        ``amax`` not given.
    """
    if grid.qmax < 1:
        raise ValueError(f'{grid} has no positive code to search a range for: pass bits >= 2, signed=False '
                         'or midrise=True')
    values = _as_float32(values)
    if amax is None:
        if not values.size:
            raise ValueError('no values to search a range for: pass at least one, or amax')
        amax = np.abs(values).max() if grid.signed else max(values.max(), 0)
    a = amax = float(amax)
    if amax >= _EPS:
        if not grid.signed:
            values = values[values > 0]  # the others are code 0 under every candidate
        candidates = amax * (_SMALLEST + (1 - _SMALLEST) * np.arange(CANDIDATES) / (CANDIDATES - 1))
        a = float(candidates[np.argmin(_squared_errors(values, candidates / grid.qmax, grid))])
    return (-a, a) if grid.signed else (0.0, a)


def _squared_errors(values, scales, grid):
    """Sum of (x - scale * code)**2 for every scale, shape (len(scales),)."""
    errors = np.zeros(len(scales))
    for start in range(0, values.size, _BLOCK):
        block = values[start:start + _BLOCK]
        for i, scale in enumerate(scales.astype(np.float32)):
            residual = np.multiply(_codes(block, scale, grid), scale, dtype=np.float64)
            np.subtract(block, residual, out=residual)
            errors[i] += np.square(residual, out=residual).sum()
    return errors


def _codes(values, scale, grid):
    """Codes of float32 values under one float32 scale, as float32."""
    codes = values / scale
    if grid.midrise:  # k counts the levels from the lowest: code = 2k - L
        codes = np.rint((codes - grid.qmin) / 2) * 2 + grid.qmin
    else:
        np.rint(codes, out=codes)
    return np.clip(codes, grid.qmin, grid.qmax, out=codes)


@_observers.register('mse')
class MSEObserver(SamplingObserver):
    """Range of least squared quantization error on the grid asked for: :func:`mse_range` of the sample.

    m is the exact largest value even when the sample is thinned. ``affine_range`` is the exact minimum and
    maximum: the search needs the grid.

    Parameters
    ----------
    max_values : int or None, default 2**20
        See :class:`SamplingObserver`.
    """

    def _amax(self, grid):
        return mse_range(self.sample, grid, self._top(grid))[1]
