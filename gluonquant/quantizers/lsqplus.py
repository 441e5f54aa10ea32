"""LSQ+: a learned offset for activations that go below zero (Bhalgat et al. 2020, arXiv:2004.09576).

Differences from the paper: the gradient factor G is applied to the offset too; the offset can be nudged to an
integer zero point before training ends, which is how it is deployed.
"""
import numpy as np

from .. import functional as Q
from ..grid import Grid
from .lsq import LSQWeight, elements_per_sample, gradient_factor
from .registry import activation, weight
from .roles import ActivationQuantizer


@weight('lsqplus')
class LSQPlusWeight(LSQWeight):
    """`LSQWeight` that starts at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2**(bits - 1)."""
    fused = 'lsqplus'

    def initial(self, x):
        rows = self.row_values(x)
        mu, sigma = rows.mean(axis=1), rows.std(axis=1)
        reach = np.maximum(np.abs(mu - 3 * sigma), np.abs(mu + 3 * sigma))
        return {'scale': np.maximum(reach / 2 ** (self.grid.bits - 1), Q.EPS), 'initialized': 1.0}


@activation('lsqplus')
class LSQPlusActivation(ActivationQuantizer):
    """x -> scale * code + offset, code = R(clip((x - offset) / scale, 0, qmax)).

    Gradient, with v = (x - offset) / scale: x receives g where 0 < v < qmax; scale G * sum g * r as in LSQ; offset
    G * sum g over the other elements.

    Parameters: ``scale``, ``offset``, each (1,), learned without weight decay; they start at the range of least
    squared error among 100 shrunk copies of [min, max]. Deployed with the zero point R(-offset / scale) clipped to
    the grid; ``nudge_offset`` makes training use exactly that (state ``nudged``).
    """
    fused = 'lsqplus'
    reads_input_again = True
    marker = 'initialized'
    starts_by_itself = False
    tracks = True
    default_observer = 'mse'

    def __init__(self, bits=4, signed=None, nudge_offset=False, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, signed=False), **kwargs)
        with self.name_scope():
            self.scale = self.learned('scale', lower=Q.EPS)
            self.offset = self.learned('offset', init=0.0)
            self.initialized = self.state('initialized', merge='max')
            self.nudged = self.state('nudged', init=float(nudge_offset))

    def initial(self, x):
        seen = self.seen(x)
        low, high = seen.lo, seen.hi
        if seen.chosen:
            low, high = seen.affine_range()
        elif high > low:
            low, high = self._least_error(seen.sample.astype('float64'), low, high)
        return {'scale': max((high - low) / self.grid.qmax, Q.EPS), 'offset': low, 'initialized': 1.0}

    def _least_error(self, values, low, high):
        def error(shrink):
            scale = shrink * (high - low) / self.grid.qmax
            code = np.clip(np.rint((values - shrink * low) / scale), 0, self.grid.qmax)
            return np.square(code * scale + shrink * low - values).sum()
        best = min(0.2 + 0.8 * np.arange(100) / 99, key=error)
        return best * low, best * high

    def nudge_offset(self, nudge=True):
        """Train (and infer) with the offset rounded to a multiple of the scale, as deployed."""
        self.write(nudged=float(nudge))

    def levels(self, F, rows, fixed):
        scale = F.maximum(F.reshape(fixed['scale'], shape=(1, 1)), Q.EPS)
        zero_point = Q.round_half_even(F, Q.limit(F, F.broadcast_div(-F.reshape(fixed['offset'], shape=(1, 1)),
                                                                  scale), 0, self.grid.qmax))
        return scale, zero_point

    def shift(self, F, scale, zero_point, fixed):
        """The offset in use, (1, 1)."""
        return Q.choose(F, fixed['nudged'], -zero_point * scale, F.reshape(fixed['offset'], shape=(1, 1)))

    def codes(self, F, rows, scale, zero_point, fixed):
        v = F.broadcast_div(F.broadcast_sub(rows, self.shift(F, scale, zero_point, fixed)), scale)
        code = Q.round_half_even(F, Q.limit(F, v, self.grid.qmin, self.grid.qmax))
        return F.broadcast_sub(code, zero_point)

    def decode(self, F, code, scale, on, fixed):
        _, zero_point = self.levels(F, None, fixed)
        offset = F.reshape(fixed['offset'], shape=(1, 1))
        real = F.broadcast_add(F.broadcast_mul(F.broadcast_add(code, zero_point), scale), offset)
        deployed = F.broadcast_mul(code, scale)     # not through the offset: that would round three times
        return F.broadcast_mul(Q.choose(F, fixed['nudged'], deployed, real), on)

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        shift = self.shift(F, scale, zero_point, fixed)
        v = F.broadcast_div(F.broadcast_sub(F.BlockGrad(rows), shift), scale)
        middle = (v > self.grid.qmin) * (v < self.grid.qmax)
        v = Q.limit(F, v, self.grid.qmin, self.grid.qmax)       # x / scale may overflow, and 0 * inf is NaN
        factor = gradient_factor(F, elements_per_sample(F, data), self.grid.qmax) * (1 - fixed['frozen']) * on
        step, offset = (F.broadcast_mul(Q.zero_with_gradient(F, F.reshape(params[name], shape=(1, 1))), factor)
                        for name in ('scale', 'offset'))
        residual = F.broadcast_add(code, zero_point) - middle * v
        return (F.broadcast_maximum(middle, 1 - on) * Q.zero_with_gradient(F, rows)
                + Q.times(F, residual, step) + Q.times(F, 1 - middle, offset))
