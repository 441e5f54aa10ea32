"""GDRQ: clip at a multiple of the mean magnitude, then quantize linearly (Yu et al. 2019, arXiv:1908.01477).

weights      T = max(k mean|w|, EPS) per group of output channels; clipped = clip(w, -T, T)
activations  t = k mean|x|; T := t first, then T + lam (t - T); Te = max(T, EPS)
phase 1 (do_quant=False)  y = clipped
phase 2                   s = T / Q (signed) or T / L (unsigned), y = R(clipped / s) s

In phase 1 codes and scale are those of phase 2, although y is not on the grid.
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
    gradient_mask,
    narrow_grid,
    near_edge,
    near_half,
    near_half_measured,
    per_tensor_only,
    single,
    unquantized,
    unsigned_grid,
    vector,
    zeros_like_scale,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, ktimes=2.0, group_size=-1, do_quant=True,
           grad_mode='ste'):
    x, g = double(x), double(g)
    per_tensor_only('gdrq', per_channel)                    # group_size=1 is one scale per output channel
    qmin, qmax = narrow_grid(bits)
    state = {'phase': np.array([float(do_quant)])}
    if x.size == 0:
        return unquantized(x, g, state)
    channels = x.shape[0]
    if group_size != -1 and (group_size < 1 or channels % group_size):
        raise ValueError(f'group_size {group_size} does not divide {channels} output channels')

    if group_size == -1:
        T = single(np.maximum([ktimes * np.abs(x).mean()], EPS))
        scale = single(T / qmax)
        T_x, s = T, scale
    else:
        groups = np.abs(x).reshape(channels // group_size, -1)
        T = single(np.maximum(ktimes * groups.mean(axis=1), EPS))
        scale = np.repeat(single(T / qmax), group_size)     # expanded to one per output channel
        column = (channels,) + (1,) * (x.ndim - 1)
        T_x, s = np.repeat(T, group_size).reshape(column), scale.reshape(column)
    return _clipped_linear(x, g, qmin, qmax, scale, s, -T_x, T_x, do_quant, grad_mode, state, measured=True)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, ktimes=2.0, lam=0.001,
               do_quant=True, grad_mode='clip'):
    x, g = double(x), double(g)
    T = vector(state['threshold']) if state else np.zeros(1)
    if training and x.size:
        t = ktimes * np.abs(x).mean()
        if np.isfinite(t):
            T = single(T + lam * (t - T)) if T[0] > 0 else single([t])
    state = {'threshold': T, 'phase': np.array([float(do_quant)])}
    if x.size == 0 or (not training and T[0] <= 0):
        return unquantized(x, g, state)

    Te = np.maximum(T, single(EPS))
    qmin, qmax = narrow_grid(bits) if signed else unsigned_grid(bits)
    scale = single(Te / qmax)
    lower = -Te if signed else 0 * Te
    return _clipped_linear(x, g, qmin, qmax, scale, scale, lower, Te, do_quant, grad_mode, state, measured=training)


def _clipped_linear(x, g, qmin, qmax, scale, s, lower, upper, do_quant, grad_mode, state, measured):
    clipped = np.clip(x, lower, upper)
    v = np.clip(divide(clipped, s), qmin, qmax)
    codes = encode(v, qmin, qmax)
    y = codes * s if do_quant else clipped
    ties = near_half_measured(v, s) if measured else near_half(v)
    ties |= near_edge(x, lower, EDGE_MEASURED) | near_edge(x, upper, EDGE_MEASURED)
    return Result(y=decode(x, y), codes=codes, scale=scale, zero_point=zeros_like_scale(scale),
                  dx=g * gradient_mask(grad_mode, x, lower, upper), state=state, ties=ties)
