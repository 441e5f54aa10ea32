"""QIL: the interval that is quantized is learned from the task loss (Jung et al. 2019, arXiv:1808.05779).

Magnitudes below the pruning point p = center - distance become 0, above the clipping point t = center + distance
they become the top level.

Differences from the paper: starts as the identity on [0, t0] of the pre-trained tensor (p = 0); p stays >= 0;
``rescale`` keeps the size of pre-trained tensors (False is the paper, which relies on a BatchNorm behind).
"""
import numpy as np

from .. import functional as Q
from .. import observers
from ..grid import Grid
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer


class Interval:
    """The learned interval, for both roles.

    Parameters: ``center``, ``distance`` (and ``gamma`` for weights), each (1,), learned at 1/100 of the weights'
    rate without decay; kept at distance >= 1e-4 t0, center >= distance, 0.1 <= gamma <= 10. Where center falls below
    distance they meet halfway: their gradients pull apart at p = 0, and a center that is raised alone lets the interval
    grow until every code is 0.
    """
    marker = 'initialized'
    starts_by_itself = False
    tracks = True

    def add_interval(self, rescale):
        """Create the Parameters of the interval."""
        self.rescale = bool(rescale)
        with self.name_scope():
            self.start = self.state('start', init=1.0)      # t0, which bounds distance from below
            self.distance = self.learned('distance', init=0.5, lower=(self.start, 1e-4), lr_mult=0.01)
            self.center = self.learned('center', init=0.5, lower=(self.distance, 1.0), lr_mult=0.01)
            self.initialized = self.state('initialized', merge='max')

    def fused_options(self):
        return {**super().fused_options(), 'rescale': self.rescale}

    def interval_on(self, t0):
        """The Parameters that make the quantizer the identity, but for rounding, on [0, t0]."""
        t0 = max(float(t0), Q.EPS)
        return {'start': t0, 'distance': t0 / 2, 'center': t0 / 2, 'initialized': 1.0}

    def has_range(self, F, fixed):
        return super().has_range(F, fixed) * F.ones_like(fixed['start'])

    def levels(self, F, rows, fixed):
        center, distance = fixed['center'], fixed['distance']
        reach = center + distance if self.rescale else F.ones_like(center)
        return F.reshape(reach, shape=(1, 1)) / self.grid.qmax, None

    def magnitude(self, F, rows):
        """What is compared with the interval, and the sign that is put back."""
        raise NotImplementedError

    def place(self, F, magnitude, fixed):
        """(|x| - p) / (2 distance): 0 at the pruning point, 1 at the clipping point."""
        center, distance = fixed['center'], fixed['distance']
        shifted = F.broadcast_sub(magnitude, F.reshape(center - distance, shape=(1, 1)))
        return F.broadcast_div(shifted, F.reshape(2 * distance, shape=(1, 1)))

    def codes(self, F, rows, scale, zero_point, fixed):
        magnitude, sign = self.magnitude(F, rows)
        hat = Q.limit(F, self.place(F, magnitude, fixed), 0, 1)
        if 'gamma' in fixed:
            hat = F.broadcast_power(hat, F.reshape(fixed['gamma'], shape=(1, 1)))
        return sign * Q.round_half_even(F, hat * self.grid.qmax)

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        c, d = (F.reshape(fixed[name], shape=(1, 1)) for name in ('center', 'distance'))
        constant = F.BlockGrad(rows)
        magnitude, sign = self.magnitude(F, constant)
        place = F.maximum(self.place(F, magnitude, fixed), 1e-6)
        interior = Q.inside(F, magnitude, c - d, c + d)
        slope = interior
        if 'gamma' in fixed:
            gamma = F.reshape(fixed['gamma'], shape=(1, 1))
            powered = F.broadcast_power(place, gamma)
            slope = interior * F.broadcast_mul(powered / place, gamma)
        reach = scale * self.grid.qmax
        slope = F.broadcast_mul(slope, reach * 0.5 / d)
        grow = code / self.grid.qmax if self.rescale else F.zeros_like(code)
        to_center = grow - sign * slope
        to_distance = grow - sign * slope * F.broadcast_div(F.broadcast_sub(magnitude, c), d)
        zeros = (F.broadcast_add(F.broadcast_mul(slope, on), 1 - on)) * Q.zero_with_gradient(F, rows)
        zeros = zeros + Q.times(F, to_center, self._learning(F, params['center'], on, fixed))
        zeros = zeros + Q.times(F, to_distance, self._learning(F, params['distance'], on, fixed))
        if 'gamma' in fixed:
            to_gamma = F.broadcast_mul(sign * interior * powered * F.log(place), reach)
            zeros = zeros + Q.times(F, to_gamma, self._learning(F, params['gamma'], on, fixed))
        return zeros

    def _learning(self, F, parameter, on, fixed):
        return F.reshape(Q.zero_with_gradient(F, parameter) * (1 - fixed['frozen']) * on, shape=(1, 1))


@weight('qil')
class QILWeight(Interval, WeightQuantizer):
    """w -> r sign(w) R(hat qmax) / qmax, hat = clip((|w| - p) / (2 distance), 0, 1) ** gamma.

    Grid: signed narrow, bits >= 2, per tensor. r = t with ``rescale``, else 1.

    Parameters
    ----------
    rescale : bool, default True
    train_gamma : bool, default False
        Let the Trainer move the exponent ``gamma``; otherwise its learning-rate multiplier is 0.
    """
    fused = 'qil'
    min_bits = 2
    holds = False

    def __init__(self, bits=4, rescale=True, train_gamma=False, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, narrow_range=True), **kwargs)
        if self.per_channel:
            raise ValueError('per_channel=True: QIL learns one interval for the whole weight')
        self.add_interval(rescale)
        with self.name_scope():
            self.gamma = self.learned('gamma', lower=0.1, upper=10.0, lr_mult=0.01 if train_gamma else 0.0)

    def magnitude(self, F, rows):
        return F.abs(rows), F.sign(rows)

    def initial(self, x):
        values = self.row_values(x)
        if self.grid.bits >= 4:
            return self.interval_on(np.abs(values).max())
        observer = observers.create('mse', max_values=None)
        observer.update(values)
        return self.interval_on(observer.range(self.grid)[1])


@activation('qil')
class QILActivation(Interval, ActivationQuantizer):
    """x -> r R(hat qmax) / qmax, hat = clip((x - p) / (2 distance), 0, 1); values below p become 0.

    Grid: unsigned; inputs that carry information below zero are not for this method. Start: t0 = 99.9th percentile
    of the calibration data.

    Deployed, the encoder has its own scale: `encoder` gives it with p, which folds into the bias before.
    """
    fused = 'qil'
    reads_input_again = True
    signed_supported = False
    default_observer = 'percentile'
    observer_options = {'percentile': 99.9}

    def __init__(self, bits=4, signed=None, rescale=True, **kwargs):
        self.check_bits(bits)
        if signed:
            raise ValueError('signed=True: QIL activations are unsigned, what is below the pruning point becomes 0')
        super().__init__(bits, Grid(bits, signed=False), **kwargs)
        self.add_interval(rescale)

    def magnitude(self, F, rows):
        return rows, F.ones_like(rows)

    def initial(self, x):
        return self.interval_on(self.seen(x).range(self.grid)[1])

    def encoder(self):
        """(p, input scale): code = clip(R((x - p) / input scale), 0, qmax); p is 0 right after calibration."""
        center, distance = float(self.value('center')[0]), float(self.value('distance')[0])
        return center - distance, 2 * distance / self.grid.qmax
