"""Weights that lie on their grid already, as packed files hold them."""
from .. import functional as Q
from ..grid import Grid
from .registry import weight
from .roles import WeightQuantizer


@weight('fixed')
class FixedWeight(WeightQuantizer):
    """w -> scale * R(w / scale), with the scale that was stored; whatever method made the codes.

    Gradient: identity. Nothing is clipped, so that codes may leave the grid in training; `gluonquant.save` keeps nets
    that are to be trained on.

    Parameters
    ----------
    midrise : bool, default False
        Codes are odd.

    State: ``scale``, one per channel or (1,); ``initialized``.
    """
    trains = False
    marker = 'initialized'
    holds = tracks = False

    def __init__(self, bits=8, midrise=False, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, midrise=midrise), **kwargs)
        with self.name_scope():
            self.scale = self.state('scale', shape=self.scale_shape(), init=1.0)
            self.initialized = self.state('initialized', merge='max')

    def initial(self, x):
        """From an array, as `int8` does; scales of a file are written instead."""
        return {'scale': abs(self.row_values(x)).max(axis=1).clip(Q.EPS) / self.grid.qmax, 'initialized': 1.0}

    def levels(self, F, rows, fixed):
        return F.reshape(fixed['scale'], shape=(-1, 1)), None

    def codes(self, F, rows, scale, zero_point, fixed):
        return Q.round_half_even(F, F.broadcast_div(rows, scale))
