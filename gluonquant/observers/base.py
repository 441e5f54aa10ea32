"""What every observer shares: exact running statistics and, where needed, a bounded sample of the values.

Everything is computed from the values as float32, the dtype of the library's state. Whatever the observer,
``count``, ``batches``, ``lo``, ``hi``, ``amax`` and ``mean_abs`` are exact over all values shown.
"""
import numpy as np

from ..registry import Registry

_observers = Registry('observer')
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)     # 2**64 / golden ratio, odd


def _as_float32(x):
    """Flatten one batch to float32, refusing what has no order or is not finite."""
    values = np.asarray(x.asnumpy() if hasattr(x, 'asnumpy') else x)
    if values.dtype.kind not in 'fiub':
        raise TypeError(f'an observer takes real numbers, not values of dtype {values.dtype}')
    with np.errstate(over='ignore'):
        values = values.astype(np.float32, copy=False).ravel()
    finite = np.count_nonzero(np.isfinite(values))
    if finite < values.size:
        bad, nans = values.size - finite, np.count_nonzero(np.isnan(values))
        raise ValueError(f'{bad} of {values.size} values are not finite in float32 ({nans} NaN, {bad - nans} '
                         'Inf); the batch was not counted. Find where they arise before calibrating')
    return values


class Observer:
    """Collects statistics of the batches it is shown.

    Subclasses implement ``_amax(grid)`` and, if they keep more than the running statistics,
    ``_collect(values)``.

    Attributes
    ----------
    count : int
        Values seen.
    batches : int
        Batches seen, empty ones left out.
    """

    def __init__(self):
        self.count = 0
        self.batches = 0
        self._lo = np.inf
        self._hi = -np.inf
        self._sum_abs = 0.0
        self.chosen = True      # False: a method's own observer, whose statistics need not mean its range

    def update(self, x):
        """Observe one batch. An empty batch is ignored.

        Parameters
        ----------
        x : NDArray or ndarray
            Any shape, any real dtype; taken as float32.

        Raises
        ------
        ValueError
            Some values are NaN, Inf or beyond float32: the message counts them. Nothing has changed then.
        TypeError
            The values are not real numbers.
        """
        values = _as_float32(x)
        if not values.size:
            return
        self._collect(values)
        self.count += values.size
        self.batches += 1
        self._lo = min(self._lo, float(values.min()))
        self._hi = max(self._hi, float(values.max()))
        self._sum_abs += float(np.abs(values).sum(dtype=np.float64))

    @property
    def lo(self):
        """Smallest value seen."""
        self._require_data()
        return self._lo

    @property
    def hi(self):
        """Largest value seen."""
        self._require_data()
        return self._hi

    @property
    def amax(self):
        """Largest magnitude seen, max(|lo|, |hi|)."""
        return max(abs(self.lo), abs(self.hi))

    @property
    def mean_abs(self):
        """Mean magnitude of all values seen, summed in float64."""
        self._require_data()
        return self._sum_abs / self.count

    def range(self, grid):
        """Propose a range for ``grid``.

        Parameters
        ----------
        grid : Grid

        Returns
        -------
        lo, hi : float
            ``(-a, a)`` for a signed grid, ``(0, a)`` for an unsigned one; the scale is ``a / grid.qmax``.
            ``a`` is 0 when every value is zero, or none is positive on an unsigned grid: floor it before
            dividing.

        Raises
        ------
        RuntimeError
            Nothing was observed.
        """
        self._require_data()
        a = float(self._amax(grid))
        return (-a, a) if grid.signed else (0.0, a)

    def affine_range(self):
        """Propose an asymmetric range, for grids with a zero-point: here the exact minimum and maximum.

        Returns
        -------
        lo, hi : float
            Not widened to contain zero; that belongs to the affine quantizer.

        Raises
        ------
        RuntimeError
            Nothing was observed.
        """
        return self.lo, self.hi

    def _top(self, grid):
        """Exact largest value that the grid can represent: of |x| if signed, of max(x, 0) if unsigned."""
        return self.amax if grid.signed else max(self.hi, 0.0)

    def _require_data(self):
        if not self.count:
            raise RuntimeError(f'{type(self).__name__} has observed nothing: call update(x) with at least '
                               'one non-empty batch first')

    def _collect(self, values):
        """Take what this observer needs from one checked batch: float32, flat, not empty, not yet counted."""

    def _amax(self, grid):
        raise NotImplementedError(f'{type(self).__name__} does not define _amax(grid)')


class SamplingObserver(Observer):
    """An observer that needs the values themselves and keeps a bounded sample of them.

    All values are kept while at most ``max_values`` have arrived. After that the sample is a fixed, even choice of
    one in 2**k positions of the stream, with the smallest k that fits: the same however the stream is cut into
    batches. Positions are chosen by multiplicative hashing with the golden ratio; a plain stride would meet the
    same column of every feature map whose width is a power of two.

    Parameters
    ----------
    max_values : int or None, default 2**20
        Size limit of the sample (4 bytes each); None keeps everything.

    Raises
    ------
    ValueError
        ``max_values`` is below 1 or not an integer.
    """

    def __init__(self, max_values=2**20):
        super().__init__()
        integer = isinstance(max_values, (int, np.integer)) and not isinstance(max_values, bool)
        if max_values is not None and not (integer and max_values >= 1):
            raise ValueError(f'max_values={max_values!r} is not a sample size: pass an integer >= 1, or None '
                             'to keep every value')
        self.max_values = max_values
        self._rarity = 1                # one in how many positions is kept, a power of two
        self._kept = 0
        self._chunks, self._keys = [], []

    @property
    def sample(self):
        """The values kept, float32 in order of arrival. Shared with the observer: do not write to it."""
        self._require_data()
        if len(self._chunks) > 1:
            self._chunks, self._keys = [np.concatenate(self._chunks)], [np.concatenate(self._keys)]
        return self._chunks[0]

    def _collect(self, values):
        keys = np.arange(self.count, self.count + values.size, dtype=np.uint64) * _GOLDEN
        values, keys = self._thinned(values, keys)
        self._chunks.append(values)
        self._keys.append(keys)
        self._kept += values.size
        while self.max_values is not None and self._kept > self.max_values:
            self._rarity *= 2
            values, keys = self._thinned(np.concatenate(self._chunks), np.concatenate(self._keys))
            self._chunks, self._keys, self._kept = [values], [keys], values.size

    def _thinned(self, values, keys):
        keep = keys <= np.uint64(2**64 // self._rarity - 1)
        return values[keep], keys[keep]
