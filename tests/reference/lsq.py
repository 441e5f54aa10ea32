"""LSQ: the step size is a parameter (Esser et al. 2019, arXiv:1902.08153).

s := max(s, EPS), v = x / s, code = clip(R(v), qmin, qmax), y = code s
dx = g [qmin < v < qmax]
ds = G sum g r,  r = qmin if v <= qmin, qmax if v >= qmax, else R(v) - v,  G = 1 / sqrt(N qmax)

Chain rule with EWGS: y = q s and v = x / s give ds = G sum g (q - f v [qmin < v < qmax]), f = dv / dq; f = 1 is r.
"""
import numpy as np

from .common import (
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    ewgs_factor,
    full_grid,
    near_edge,
    near_half,
    rows,
    single,
    spread,
    unquantized,
    unsigned_grid,
    vector,
    zeros_like_scale,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, ewgs=None):
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    qmin, qmax = full_grid(bits)
    elements = x.size // x.shape[axis] if per_channel else x.size
    return _learned_step(x, g, qmin, qmax, params['scale'], elements, per_channel, axis, ewgs)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, ewgs=None):
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    qmin, qmax = full_grid(bits) if signed else unsigned_grid(bits)
    elements = x.size // x.shape[batch_axis]                # of one sample
    return _learned_step(x, g, qmin, qmax, params['scale'], elements, False, 0, ewgs)


def _learned_step(x, g, qmin, qmax, scale, elements, per_channel, axis, ewgs):
    scale = np.maximum(vector(scale), single(EPS))
    s = spread(scale, x, per_channel, axis)
    v = divide(x, s)                                        # decides code and mask
    codes = encode(v, qmin, qmax)

    inside = (qmin < v) & (v < qmax)
    f = ewgs_factor(g, x / s, codes, qmin, qmax, ewgs)
    dx = g * f * inside
    r = np.where(v <= qmin, qmin, np.where(v >= qmax, qmax, codes - f * (x / s)))
    G = 1 / np.sqrt(elements * qmax)
    ds = G * rows(g * r, per_channel, axis).sum(axis=1)
    ties = near_half(np.clip(v, qmin, qmax)) | near_edge(v, qmin) | near_edge(v, qmax)
    return Result(y=decode(x, codes * s), codes=codes, scale=scale, zero_point=zeros_like_scale(scale), dx=dx,
                  dparams={'scale': ds}, ties=ties)


def initial(x, bits, role, signed=False, *, per_channel=False, axis=0):
    """s = 2 mean|x| / sqrt(qmax), from the weights (each channel its own) or the first batch."""
    _, qmax = full_grid(bits) if role == 'weight' or signed else unsigned_grid(bits)
    mean_abs = np.abs(rows(double(x), per_channel, axis)).mean(axis=1)
    return {'scale': single(np.maximum(2 * mean_abs / np.sqrt(qmax), EPS))}
