"""PACT: the clipping level of activations is learned (Choi et al. 2018, arXiv:1805.06085).

a = max(alpha, EPS)
unsigned  s = a / L, code = R(clip(x, 0, a) / s),  dx = g [0 <= x < a],  dalpha = sum g [x >= a]
signed    s = a / Q, code = R(clip(x, -a, a) / s), dx = g [|x| < a],     dalpha = sum g sign(x) [|x| >= a]

EWGS scales dx inside the interval; dalpha has no rounding residual, so nothing of it changes.
"""
import numpy as np

from . import observers
from .common import (
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    ewgs_factor,
    narrow_grid,
    near_edge,
    near_half,
    single,
    unquantized,
    unsigned_grid,
    vector,
    zeros_like_scale,
)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, ewgs=None):
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    a = np.maximum(vector(params['alpha']), single(EPS))
    if signed:
        qmin, qmax = narrow_grid(bits)
        lower = -a
        inside, saturated = np.abs(x) < a, np.sign(x) * (np.abs(x) >= a)
    else:
        qmin, qmax = unsigned_grid(bits)
        lower = 0 * a
        inside, saturated = (x >= 0) & (x < a), x >= a
    scale = single(a / qmax)

    v = divide(np.clip(x, lower, a), scale)
    codes = encode(v, qmin, qmax)
    dx = g * inside * ewgs_factor(g, np.clip(x, lower, a) / scale, codes, qmin, qmax, ewgs)
    ties = near_half(v) | near_edge(x, lower) | near_edge(x, a)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=zeros_like_scale(scale), dx=dx,
                  dparams={'alpha': np.sum(g * saturated).reshape(1)}, ties=ties)


def initial(x=None, bits=None, role='activation', signed=False, *, percentile=99.9):
    """The 99.9 percentile of the calibration data, 8.0 without any."""
    if x is None:
        return {'alpha': np.array([8.0])}
    return {'alpha': single([max(observers.percentile(x, percentile, signed), EPS)])}
