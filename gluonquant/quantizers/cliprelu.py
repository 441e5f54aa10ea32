"""Clip to a fixed threshold, then round: what a ReLU6 becomes."""
from ..grid import Grid
from .registry import activation
from .roles import ActivationQuantizer


@activation('cliprelu')
class ClipReLU(ActivationQuantizer):
    """x -> scale * R(clip(x, 0, threshold) / scale), scale = threshold / qmax. Gradient: g where 0 <= x <= threshold.

    Parameters
    ----------
    threshold : float, default 6.0
        Fixed; calibration and training leave it alone. Saved as the state ``threshold`` (1,).
    """
    fused = 'cliprelu'
    signed_supported = False
    grad_mode = 'clip'

    def __init__(self, bits=8, signed=None, threshold=6.0, **kwargs):
        self.check_bits(bits)
        if signed:
            raise ValueError('signed=True: a clipped ReLU has no negative outputs')
        if not threshold > 0:
            raise ValueError(f'threshold={threshold!r}: pass a positive number')
        super().__init__(bits, Grid(bits, signed=False), **kwargs)
        with self.name_scope():
            self.threshold = self.state('threshold', init=threshold)

    def levels(self, F, rows, fixed):
        return F.reshape(fixed['threshold'], shape=(1, 1)) / self.grid.qmax, None

    def bounds(self, F, scale, zero_point, fixed):
        return F.zeros_like(fixed['threshold']), fixed['threshold']
