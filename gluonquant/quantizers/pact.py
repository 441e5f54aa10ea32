"""PACT: the clipping level of activations is learned (Choi et al. 2018, arXiv:1805.06085).

Differences from the paper: a signed option for inputs that have no ReLU in front; alpha starts from calibration.
"""
from .. import functional as Q
from ..grid import Grid
from .registry import activation
from .roles import ActivationQuantizer


@activation('pact')
class PACT(ActivationQuantizer):
    """x -> scale * R(clip(x, 0, alpha) / scale), scale = alpha / qmax; signed: clip to [-alpha, alpha].

    Gradient: x receives g where 0 <= x < alpha (signed: |x| < alpha); alpha receives the sum of g where x >= alpha
    (signed: of g * sign(x) where |x| >= alpha). It flows below alpha's floor too, so that alpha can recover.

    Parameters: ``alpha`` (1,), learned with the weights' weight decay; starts at the 99.9th percentile of the
    calibration data, without calibration at 8.0; kept >= 1e-3.
    """
    fused = 'pact'
    marker = 'initialized'
    default_range = True
    tracks = True
    ewgs_supported = True
    default_observer = 'percentile'
    observer_options = {'percentile': 99.9}

    def __init__(self, bits=4, signed=None, **kwargs):
        signed = bool(signed)
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, signed, narrow_range=signed), **kwargs)
        with self.name_scope():
            self.alpha = self.learned('alpha', init=8.0, lower=1e-3, wd_mult=1.0)
            self.initialized = self.state('initialized', merge='max')

    def initial(self, x):
        return {'alpha': max(self.seen(x).range(self.grid)[1], 1e-3), 'initialized': 1.0}

    def levels(self, F, rows, fixed):
        return F.maximum(F.reshape(fixed['alpha'], shape=(1, 1)), Q.EPS) / self.grid.qmax, None

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        constant = F.BlockGrad(rows)
        reach = F.maximum(fixed['alpha'], Q.EPS) + Q.BIG * (1 - on)
        above = F.broadcast_greater_equal(constant, reach)
        if self.grid.signed:
            below = F.broadcast_lesser_equal(constant, -reach)
            passed, clipped = 1 - above - below, above - below
        else:
            passed = F.broadcast_greater_equal(constant, -Q.BIG * (1 - on)) - above
            clipped = above
        alpha = Q.zero_with_gradient(F, params['alpha']) * (1 - fixed['frozen'])
        zeros = passed * Q.zero_with_gradient(F, rows) + Q.times(F, clipped, F.reshape(alpha, shape=(1, 1)))
        return self.scale_gradient(F, zeros, rows, on, code, scale)
