"""SAWB: weight scale from the first two moments of the weights (Choi et al. 2018, arXiv:1807.06964)."""
from .. import functional as Q
from ..grid import Grid
from .int8 import check_grad_mode
from .registry import weight
from .roles import WeightQuantizer

# bits -> c1, c2 of alpha = c1 * sqrt(mean w^2) + c2 * mean|w|
_MIDRISE = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64), 6: (22.20, -24.02),
            7: (27.27, -30.03)}
_NARROW = {2: (2.6, -1.71), 3: (6.94, -6.30), 4: (12.035, -12.03), 5: (16.91, -17.79), 6: (22.06, -23.86),
           7: (28.24, -30.81), 8: (31.76, -35.04)}


@weight('sawb')
class SAWB(WeightQuantizer):
    """alpha = c1 sqrt(mean w^2) + c2 mean|w|, kept within [mean|w|, max|w|]; recomputed in every pass.

    Parameters
    ----------
    grid : 'midrise' (default up to 7 bits: levels -alpha..alpha without 0) or 'tread' (narrow signed; always at 8)
    grad_mode : 'ste' (default) or 'clip' (zero where |w| > alpha)

    Raises
    ------
    ValueError
        Bits outside 2..8: the constants are fitted for those.
    """
    fused = 'sawb'
    min_bits = 2
    max_bits = 8

    def __init__(self, bits=4, grid=None, grad_mode='ste', **kwargs):
        self.check_bits(bits)
        if grid not in (None, 'midrise', 'tread'):
            raise ValueError(f"grid={grid!r}: pass 'midrise' or 'tread'")
        midrise = bits < 8 and grid != 'tread'
        super().__init__(bits, Grid(bits, narrow_range=not midrise, midrise=midrise), **kwargs)
        self.grad_mode = check_grad_mode(grad_mode)
        self._c1, self._c2 = (_MIDRISE if midrise else _NARROW)[bits]

    def fused_options(self):
        return {**super().fused_options(), 'midrise': self.grid.midrise, 'c1': self._c1, 'c2': self._c2}

    def alpha(self, F, rows):
        """The clipping level of each row, (R, 1)."""
        magnitude = F.abs(rows)
        mean = Q.row_mean(F, magnitude)
        alpha = self._c1 * F.sqrt(Q.row_mean(F, F.square(F.cast(rows, 'float64')))) + self._c2 * mean
        largest = F.max(magnitude, axis=1, keepdims=True)
        return F.maximum(F.broadcast_minimum(F.broadcast_maximum(alpha, mean), largest), Q.EPS)

    def levels(self, F, rows, fixed):
        return self.alpha(F, rows) / self.grid.qmax, None

    def codes(self, F, rows, scale, zero_point, fixed):
        if not self.grid.midrise:
            return super().codes(F, rows, scale, zero_point, fixed)
        return midrise_codes(F, (F.broadcast_div(rows, scale) + self.grid.steps) / 2, self.grid.steps)


def midrise_codes(F, v, steps):
    """The odd codes 2k - L of k = R(v), 0 <= k <= L."""
    return 2 * Q.round_half_even(F, Q.limit(F, v, 0, steps)) - steps
