"""Symmetric QAT: scale from the largest magnitude (Jacob et al. 2017, arXiv:1712.05877; TensorRT's signed int8).

weights      m = max|w|, s = max(m, EPS) / Q, code = clip(R(w / s), -Q, Q)
activations  amax = EMA of the batch maximum; s = max(amax, EPS) / Q (signed) or / L (unsigned)
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
    gradient_mask,
    narrow_grid,
    near_edge,
    near_half,
    near_half_measured,
    rows,
    single,
    spread,
    unquantized,
    unsigned_grid,
    vector,
    zeros_like_scale,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, grad_mode='ste', ewgs=None):
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    m = np.maximum(np.abs(rows(x, per_channel, axis)).max(axis=1), EPS)
    m_x = spread(m, x, per_channel, axis)
    qmin, qmax = narrow_grid(bits)
    scale = single(m / qmax)
    return _symmetric(x, g, qmin, qmax, scale, spread(scale, x, per_channel, axis), -m_x, m_x, grad_mode, ewgs)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, ema_decay=0.99,
               delay_quant=0, grad_mode='ste', ewgs=None):
    x, g = double(x), double(g)
    state = state or {'amax': np.zeros(1), 'steps': np.zeros(1)}
    amax, steps = vector(state['amax']), vector(state['steps'])
    delayed = steps[0] < delay_quant
    measured = False
    if training and x.size:
        batch = np.abs(x).max() if signed else max(x.max(), 0)
        if np.isfinite(batch):
            measured = amax[0] > 0
            amax = single(ema_decay * amax + (1 - ema_decay) * batch) if amax[0] > 0 else single([batch])
        steps = steps + 1
    state = {'amax': amax, 'steps': steps}
    if x.size == 0 or delayed or (not training and amax[0] <= 0):
        return unquantized(x, g, state)

    m = np.maximum(amax, single(EPS))
    qmin, qmax = narrow_grid(bits) if signed else unsigned_grid(bits)
    scale = single(m / qmax)
    result = _symmetric(x, g, qmin, qmax, scale, spread(scale, x), -m[0] if signed else 0.0, m[0], grad_mode, ewgs,
                        measured)
    result.state = state
    return result


def _symmetric(x, g, qmin, qmax, scale, scale_x, lower, upper, grad_mode, ewgs, measured=False):
    v = divide(x, scale_x)
    codes = encode(v, qmin, qmax)
    dx = g * ewgs_factor(g, x / scale_x, codes, qmin, qmax, ewgs) * gradient_mask(grad_mode, x, lower, upper)
    clipped = np.clip(v, qmin, qmax)
    ties = near_half_measured(clipped, scale_x) if measured else near_half(clipped)
    return Result(y=decode(x, codes * scale_x), codes=codes, scale=scale, zero_point=zeros_like_scale(scale), dx=dx,
                  ties=ties | near_edge(x, lower) | near_edge(x, upper))
