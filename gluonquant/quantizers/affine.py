"""Affine quantization with an integer zero point: min/max (arXiv:1712.05877) and FQN (Li et al., CVPR 2019).

FQN is the same grid with a percentile in place of the extremes, weights per channel, and frozen, folded BatchNorm.

Differences from the papers: zero is always a level, so that zero padding is exact; percentile and decay are our
choice (the FQN paper gives neither).
"""
from .. import functional as Q
from ..grid import Grid
from .int8 import check_fraction, check_grad_mode
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer


def affine_levels(F, low, high, steps):
    """Scale and integer zero point of the range [min(low, 0), max(high, 0)] cut into ``steps`` steps."""
    low, high = F.minimum(low, 0), F.maximum(high, 0)
    scale = F.maximum(high - low, Q.EPS) / steps
    return scale, Q.round_half_even(F, Q.limit(F, -low / scale, 0, steps))


@weight('affine')
class AffineWeight(WeightQuantizer):
    """Range = min and max of the present weight, per output channel (default) or tensor.

    Grid: unsigned with zero point. Gradient: identity.
    """
    fused = 'affine'
    per_channel_default = True
    has_zero_point = True
    ewgs_supported = True

    def __init__(self, bits=8, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, signed=False), **kwargs)

    def levels(self, F, rows, fixed):
        return affine_levels(F, F.min(rows, axis=1, keepdims=True), F.max(rows, axis=1, keepdims=True),
                             self.grid.qmax)


@weight('fqn')
class FQNWeight(AffineWeight):
    """`AffineWeight`; the method's own part is the folded, frozen BatchNorm in front of it."""
    fused = 'affine'


@activation('affine')
class AffineActivation(ActivationQuantizer):
    """Range (lo, hi): moving averages of the batches' percentiles (100 - P, P); the first batch sets them.

    Parameters
    ----------
    percentile : float in (50, 100]
        P; 100 is min and max, anything less sorts the tensor in every training pass.
    ema_decay : float in [0, 1)
    grad_mode : 'clip' (default; zero outside the representable range) or 'ste'

    State: ``lo``, ``hi``, ``initialized``, each (1,).
    """
    fused = 'affine'
    follows = True
    marker = 'initialized'
    tracks = True
    ewgs_supported = True
    default_percentile = 100.0

    def __init__(self, bits=8, signed=None, percentile=None, ema_decay=0.99, grad_mode='clip', **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, signed=False), **kwargs)
        percentile = self.default_percentile if percentile is None else percentile
        if not 50 < percentile <= 100:
            raise ValueError(f'percentile={percentile!r}: pass a number in (50, 100]')
        self.percentile = float(percentile)
        self.ema_decay = check_fraction('ema_decay', ema_decay)
        self.grad_mode = check_grad_mode(grad_mode)
        if self.percentile < 100:
            self.default_observer, self.observer_options = 'percentile', {'percentile': self.percentile}
        with self.name_scope():
            self.lo = self.state('lo', merge='mean' if self.percentile < 100 else 'min')
            self.hi = self.state('hi', merge='mean' if self.percentile < 100 else 'max')
            self.initialized = self.state('initialized', merge='max')

    def fused_options(self):
        return {**super().fused_options(), 'decay': self.ema_decay, 'percentile': self.percentile}

    def initial(self, x):
        low, high = self.seen(x).affine_range()
        return {'lo': low, 'hi': high, 'initialized': 1.0}

    def track(self, F, rows, learning, params, fixed):
        flat = F.reshape(rows, shape=(-1,))
        if self.percentile < 100:
            low, high = Q.percentile(F, flat, 100 - self.percentile), Q.percentile(F, flat, self.percentile)
        else:
            low, high = F.min(flat, axis=0), F.max(flat, axis=0)
        # Sorting hides NaN in some place; a batch with one must not move the range.
        learning = learning * Q.is_finite(F, low) * Q.is_finite(F, high) * (1 - F.max(flat != flat, axis=0))
        unset = fixed['initialized'] <= 0
        return {'lo': Q.assign(F, params['lo'], Q.moving_average(F, fixed['lo'], low, self.ema_decay, learning,
                                                                 unset)),
                'hi': Q.assign(F, params['hi'], Q.moving_average(F, fixed['hi'], high, self.ema_decay, learning,
                                                                 unset)),
                'initialized': Q.assign(F, params['initialized'], F.maximum(fixed['initialized'], learning))}

    def levels(self, F, rows, fixed):
        return affine_levels(F, *(F.reshape(fixed[name], shape=(1, 1)) for name in ('lo', 'hi')), self.grid.qmax)


@activation('fqn')
class FQNActivation(AffineActivation):
    """`AffineActivation` with P = 99.9."""
    fused = 'affine'
    default_percentile = 99.9
