"""Symmetric quantization from the largest magnitude, as integer engines do it (Jacob et al., arXiv:1712.05877).

Differences from the paper: zero point always 0 (TensorRT alignment); any bit width, 8 by default.
"""
from .. import functional as Q
from ..grid import Grid
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer


def check_grad_mode(grad_mode):
    """Return ``grad_mode`` if it is 'ste' or 'clip'."""
    if grad_mode not in ('ste', 'clip'):
        raise ValueError(f"grad_mode={grad_mode!r}: pass 'ste' (identity) or 'clip' (zero outside the range)")
    return grad_mode


def check_fraction(name, value):
    """Return ``value`` if it is a number in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f'{name}={value!r}: pass a number in [0, 1)')
    return float(value)


@weight('int8')
class Int8Weight(WeightQuantizer):
    """scale = max|w| / qmax per output channel (default) or tensor, recomputed from the weight in every pass.

    Grid: signed narrow, bits >= 2. Gradient: identity (the range contains every weight; the scale is a constant).
    """
    fused = 'int8'
    min_bits = 2
    per_channel_default = True
    ewgs_supported = True

    def __init__(self, bits=8, **kwargs):
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, narrow_range=True), **kwargs)

    def levels(self, F, rows, fixed):
        reach = F.max(F.abs(rows), axis=1, keepdims=True)
        return F.maximum(reach, Q.EPS) / self.grid.qmax, None


@activation('int8')
class Int8Activation(ActivationQuantizer):
    """scale = amax / qmax, amax an exponential moving average of the batches' max|x|; the first batch sets it.

    Parameters
    ----------
    signed : bool, default True
        True: signed grid. False: unsigned, for inputs that are never negative; amax then follows max x.
    narrow_range : bool, default True
        Signed codes are symmetric. False adds the lowest code, whose type then has no code that must be clipped; the
        scale stays amax / qmax.
    ema_decay : float in [0, 1)
    grad_mode : 'ste' (identity) or 'clip' (zero outside [-amax, amax] or [0, amax])

    State: ``amax`` (1,), 0 = no range yet.
    """
    fused = 'int8'
    follows = True
    marker = 'amax'
    tracks = True
    ewgs_supported = True
    default_observer = 'ema'

    def __init__(self, bits=8, signed=None, narrow_range=True, ema_decay=0.99, grad_mode='ste', **kwargs):
        signed = signed is None or bool(signed)
        self.check_bits(bits)
        super().__init__(bits, Grid(bits, signed, narrow_range=signed and bool(narrow_range)), **kwargs)
        self.ema_decay = check_fraction('ema_decay', ema_decay)
        self.grad_mode = check_grad_mode(grad_mode)
        with self.name_scope():
            self.amax = self.state('amax', merge='max')

    def fused_options(self):
        return {**super().fused_options(), 'decay': self.ema_decay}

    def initial(self, x):
        return {'amax': self.seen(x).range(self.grid)[1]}

    def track(self, F, rows, learning, params, fixed):
        batch = F.reshape(F.max(F.abs(rows) if self.grid.signed else F.maximum(rows, 0), axis=1), shape=(1,))
        amax = Q.moving_average(F, fixed['amax'], batch, self.ema_decay, learning, fixed['amax'] <= 0)
        return {'amax': Q.assign(F, params['amax'], amax), 'measured': learning * Q.is_finite(F, batch)}

    def has_range(self, F, fixed):
        # A first batch without a positive value leaves an unsigned amax at 0, but its range is known to be empty.
        known = fixed['amax'] > 0
        return F.broadcast_maximum(known, fixed['measured']) if 'measured' in fixed else known

    def levels(self, F, rows, fixed):
        return F.maximum(F.reshape(fixed['amax'], shape=(1, 1)), Q.EPS) / self.grid.qmax, None

    def bounds(self, F, scale, zero_point, fixed):
        reach = F.maximum(fixed['amax'], Q.EPS)
        return (-reach if self.grid.signed else F.zeros_like(reach)), reach
