"""SAWB: the clipping level of weights from their first and second moments (Choi et al. 2018, arXiv:1807.06964).

a = c1 sqrt(mean w^2) + c2 mean|w|, clipped to [mean|w|, max|w|], then floored by EPS
mid-rise  k = clip(R((w + a) / (2a) * L), 0, L), code = 2k - L, scale = a / L
tread     code = clip(R(w / scale), -Q, Q), scale = a / Q
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
    near_half_measured,
    rows,
    single,
    spread,
    unquantized,
    unsigned_grid,
    zeros_like_scale,
)

MIDRISE = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64), 6: (22.20, -24.02),
           7: (27.27, -30.03)}
TREAD = {2: (2.6, -1.71), 3: (6.94, -6.30), 4: (12.035, -12.03), 5: (16.91, -17.79), 6: (22.06, -23.86),
         7: (28.24, -30.81), 8: (31.76, -35.04)}


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, grid=None, grad_mode='ste'):
    x, g = double(x), double(g)
    if bits not in TREAD:
        raise ValueError(f'SAWB has constants for bits 2..8, got {bits}')
    if grid not in (None, 'midrise', 'tread'):
        raise ValueError(f"grid must be 'midrise' or 'tread', got {grid!r}")
    if x.size == 0:
        return unquantized(x, g)
    midrise = grid != 'tread' and bits <= 7
    c1, c2 = MIDRISE[bits] if midrise else TREAD[bits]

    per_scale = rows(x, per_channel, axis)
    mean_abs, max_abs = np.abs(per_scale).mean(axis=1), np.abs(per_scale).max(axis=1)
    a = c1 * np.sqrt((per_scale ** 2).mean(axis=1)) + c2 * mean_abs
    a = single(np.maximum(np.clip(a, mean_abs, max_abs), EPS))

    a_x = spread(a, x, per_channel, axis)
    if midrise:
        _, L = unsigned_grid(bits)
        scale = single(a / L)
        s = spread(scale, x, per_channel, axis)
        v = np.clip((divide(x, s) + L) / 2, 0, L)           # (w + a) / (2a) * L, with a = L * scale
        codes = 2 * encode(v, 0, L) - L
        ties = near_half_measured(v, s, decided=(x == 0))   # x = 0 is v = L / 2 for every scale
    else:
        qmin, qmax = narrow_grid(bits)
        scale = single(a / qmax)
        s = spread(scale, x, per_channel, axis)
        v = np.clip(divide(x, s), qmin, qmax)
        codes = encode(v, qmin, qmax)
        ties = near_half_measured(v, s)

    dx = g * gradient_mask(grad_mode, x, -a_x, a_x)
    ties |= near_edge(x, -a_x, EDGE_MEASURED) | near_edge(x, a_x, EDGE_MEASURED)
    return Result(y=decode(x, codes * s), codes=codes, scale=scale, zero_point=zeros_like_scale(scale), dx=dx,
                  ties=ties)
