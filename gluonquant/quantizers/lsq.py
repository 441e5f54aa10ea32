"""LSQ: the step size is a weight (Esser et al. 2020, arXiv:1902.08153).

Differences from the paper: weights may have one step per output channel; the step is projected to >= 1e-8 instead
of being free to change sign; activations may start from the step of least squared error, for short fine-tuning.
"""
import numpy as np

from .. import functional as Q
from ..grid import Grid
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer


def gradient_factor(F, elements, qmax):
    """G = 1 / sqrt(N qmax) (sec. 2.2): keeps updates of step and weights in proportion. (1,)"""
    return F.rsqrt(F.cast(elements, 'float32') * qmax)


def elements_per_sample(F, data):
    """Elements of one sample of a batch (first axis), (1,): what N is for activations."""
    data = F.BlockGrad(data)
    batch = F.slice_axis(F.shape_array(data), axis=0, begin=0, end=1)
    return F.cast(F.size_array(data), 'float32') / F.cast(batch, 'float32')


class LearnedStep:
    """The gradient of LSQ, for both roles.

    With v = x / scale: x receives g where qmin < v < qmax; scale receives G * sum g * r, with r = qmin, qmax outside
    and R(v) - v inside, the sum taken over the elements that share it.
    """
    marker = 'initialized'
    starts_by_itself = False
    tracks = True
    ewgs_supported = True

    def add_scale(self, shape):
        """Create the Parameters ``scale`` and ``initialized``."""
        with self.name_scope():
            self.scale = self.learned('scale', shape=shape, lower=Q.EPS)
            self.initialized = self.state('initialized', merge='max')

    def levels(self, F, rows, fixed):
        return F.maximum(F.reshape(fixed['scale'], shape=(-1, 1)), Q.EPS), None

    def elements(self, F, data):
        """How many elements share one scale, (1,): of one sample for activations."""
        raise NotImplementedError

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        v = F.broadcast_div(F.BlockGrad(rows), scale)
        middle = (v > self.grid.qmin) * (v < self.grid.qmax)
        v = Q.limit(F, v, self.grid.qmin, self.grid.qmax)       # x / scale may overflow, and 0 * inf is NaN
        factor = gradient_factor(F, self.elements(F, data), self.grid.qmax) * (1 - fixed['frozen']) * on
        step = F.broadcast_mul(Q.zero_with_gradient(F, F.reshape(params['scale'], shape=(-1, 1))), factor)
        passed = F.broadcast_maximum(middle, 1 - on) * Q.zero_with_gradient(F, rows)
        if self.ewgs is None:
            return passed + Q.times(F, code - middle * v, step)
        through_v = self.scale_gradient(F, passed - Q.times(F, middle * v, step), rows, on, code, scale)
        return through_v + Q.times(F, code, step)


@weight('lsq')
class LSQWeight(LearnedStep, WeightQuantizer):
    """`LearnedStep` on the signed full grid, bits >= 2.

    Parameters: ``scale`` (1,) or (channels,), learned without weight decay; starts at 2 mean|w| / sqrt(qmax) of the
    weight when training or calibration begins.
    """
    fused = 'lsq'
    min_bits = 2
    holds = False

    def __init__(self, bits=4, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits), **kwargs)
        self.add_scale(self.scale_shape())

    def initial(self, x):
        mean = np.abs(self.row_values(x)).mean(axis=1)
        return {'scale': np.maximum(2 * mean / np.sqrt(self.grid.qmax), Q.EPS), 'initialized': 1.0}

    def elements(self, F, data):
        rows = self.rows(F, F.BlockGrad(data))
        return F.slice_axis(F.shape_array(rows), axis=0, begin=1, end=2)


@activation('lsq')
class LSQActivation(LearnedStep, ActivationQuantizer):
    """`LearnedStep` on the unsigned (default) or signed full grid.

    Parameters
    ----------
    init : 'mean' (default: 2 mean|x| / sqrt(qmax)) or 'mse' (`observers.mse_range`)
        What the step starts at: of the calibration data or, outside of a net, of the first training batch.

    Learned: ``scale`` (1,), without weight decay.
    """
    fused = 'lsq'
    reads_input_again = True

    def __init__(self, bits=4, signed=None, init='mean', **kwargs):
        signed = bool(signed)
        self.check_bits(bits)
        if signed and bits == 1:
            raise ValueError('bits=1 with signed=True leaves the codes -1 and 0: pass bits >= 2, or signed=False')
        super().__init__(bits, Grid(bits, signed), **kwargs)
        self.add_scale((1,))
        if init not in ('mean', 'mse'):
            raise ValueError(f"init={init!r}: pass 'mean' (as in the paper) or 'mse'")
        self.init = init
        if init == 'mse':
            self.default_observer = 'mse'

    def initial(self, x):
        seen = self.seen(x)
        scale = (seen.range(self.grid)[1] / self.grid.qmax if seen.chosen or self.init == 'mse'
                 else 2 * seen.mean_abs / np.sqrt(self.grid.qmax))
        return {'scale': max(scale, Q.EPS), 'initialized': 1.0}

    def elements(self, F, data):
        return elements_per_sample(F, data)
