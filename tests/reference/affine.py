"""Affine QAT: min/max range with an integer zero-point (Jacob et al. 2017, arXiv:1712.05877).

With percentile=99.9 the activation range is FQN's (Li et al., CVPR 2019); see fqn.py.

lo := min(lo, 0), hi := max(hi, 0), s = max(hi - lo, EPS) / L, z = clip(R(-lo / s), 0, L)
code = clip(R(x / s) + z, 0, L), y = (code - z) * s
"""
import numpy as np

from .common import (
    EDGE_MEASURED,
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    ewgs_factor,
    gradient_mask,
    near_edge,
    near_half_measured,
    rows,
    single,
    spread,
    unquantized,
    unsigned_grid,
    vector,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, grad_mode='ste', ewgs=None):
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    per_scale = rows(x, per_channel, axis)
    return _affine(x, g, bits, per_scale.min(axis=1), per_scale.max(axis=1), per_channel, axis, grad_mode, ewgs)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, percentile=100.0,
               ema_decay=0.99, grad_mode='clip', ewgs=None):
    """`signed` changes nothing: the range finds out."""
    x, g = double(x), double(g)
    state = state or {'lo': np.zeros(1), 'hi': np.zeros(1), 'initialized': np.zeros(1)}
    lo, hi, initialized = vector(state['lo']), vector(state['hi']), vector(state['initialized'])
    if training and x.size:
        batch_lo, batch_hi = np.percentile(x, [100 - percentile, percentile])
        if np.isfinite(batch_lo) and np.isfinite(batch_hi) and batch_lo <= batch_hi:
            if initialized[0]:
                lo = single(ema_decay * lo + (1 - ema_decay) * batch_lo)
                hi = single(ema_decay * hi + (1 - ema_decay) * batch_hi)
            else:
                lo, hi, initialized = single([batch_lo]), single([batch_hi]), np.ones(1)
    state = {'lo': lo, 'hi': hi, 'initialized': initialized}
    if x.size == 0 or (not training and not initialized[0]):
        return unquantized(x, g, state)
    result = _affine(x, g, bits, lo, hi, False, 0, grad_mode, ewgs)
    result.state = state
    return result


def _affine(x, g, bits, lo, hi, per_channel, axis, grad_mode, ewgs):
    _, L = unsigned_grid(bits)
    lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
    scale = single(np.maximum(hi - lo, EPS) / L)
    zero = divide(-lo, scale)
    zero_point = encode(zero, 0, L)

    s, z = spread(scale, x, per_channel, axis), spread(zero_point, x, per_channel, axis)
    v = divide(x, s)
    q = encode(v, -z, L - z)            # code - z, since clip(R(v) + z, 0, L) - z = clip(R(v), -z, L - z)
    lower, upper = -z * s, (L - z) * s
    dx = g * ewgs_factor(g, x / s, q, -z, L - z, ewgs) * gradient_mask(grad_mode, x, lower, upper)

    ties = near_half_measured(np.clip(v, -z, L - z), s)
    ties |= near_edge(x, lower, EDGE_MEASURED) | near_edge(x, upper, EDGE_MEASURED)
    # a zero-point that float32 could round the other way moves every code of its channel
    shifted = near_half_measured(np.clip(zero, 0, L), scale)
    ties |= spread(shifted, x, per_channel, axis)
    return Result(y=decode(x, q * s), codes=q + z, scale=scale, zero_point=zero_point, dx=dx, ties=ties)
