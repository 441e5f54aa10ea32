"""DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160).

weights      t = tanh(w), m = max|t|, v = t / (2m) + 1/2, k = R(v L), code = 2k - L, y = r code / L
weights, 1 bit   y = mean|w| sign(w), sign(0) = +1
activations  k = R(clip(x, 0, 1) L), y = k / L
gradients    g' = 2M (R(clip(g / (2M) + 1/2 + N, 0, 1) L) / L - 1/2), M = max|g| of the sample
"""
import numpy as np

from .common import (
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    near_edge,
    near_half,
    per_tensor_only,
    round_half_even,
    single,
    unquantized,
    unsigned_grid,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, rescale=None, detach_max=False):
    x, g = double(x), double(g)
    per_tensor_only('dorefa', per_channel)
    if rescale not in (None, 'max'):
        raise ValueError(f"rescale must be None or 'max', got {rescale!r}")
    if x.size == 0:
        return unquantized(x, g)
    if bits == 1:
        return _binary_weight(x, g)
    _, L = unsigned_grid(bits)
    r = single(np.abs(x).max()) if rescale == 'max' else 1.0
    scale = single([max(r, EPS) / L])
    t = np.tanh(x)
    m = np.abs(t).max()
    if m == 0:
        return Result(y=np.zeros(x.shape), codes=np.zeros(x.shape, np.int64), scale=scale,
                      zero_point=np.zeros(1, np.int64), dx=np.zeros(x.shape), ties=np.zeros(x.shape, bool))
    v = t / (2 * m) + 0.5
    codes = 2 * encode(v * L, 0, L) - L

    h = r * g
    dt = h / m
    if not detach_max:
        maximal = np.abs(t) == m
        dt = dt + maximal * np.sign(t) / maximal.sum() * -np.sum(h * t) / m ** 2
    dx = dt * (1 - t ** 2)

    ties = near_half(v * L, decided=(x == 0))               # tanh and the quotient are inexact except at 0
    rivals = (np.abs(t) >= m * (1 - 1e-6)) & (np.abs(x) != np.abs(x).max())
    if rivals.any():                                        # float32 may see several maxima where there is one
        ties |= np.abs(t) >= m * (1 - 1e-6)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=np.zeros(1, np.int64), dx=dx,
                  ties=ties)


def _binary_weight(x, g):
    scale = single([np.abs(x).mean()])
    codes = np.where(x >= 0, 1, -1).astype(np.int64)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=np.zeros(1, np.int64), dx=g.copy(),
                  ties=np.zeros(x.shape, bool))


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0):
    x, g = double(x), double(g)
    if signed:
        raise ValueError('dorefa activations are unsigned')
    if x.size == 0:
        return unquantized(x, g)
    qmin, L = unsigned_grid(bits)
    scale = single([1 / L])
    clipped = np.clip(x, 0, 1)
    v = divide(clipped, scale)
    codes = encode(v, qmin, L)
    product = single(clipped * L)                           # the paper multiplies by L, runtimes divide by the scale
    ties = near_half(v) | near_half(product) | (encode(product, qmin, L) != codes) | near_edge(x, 1.0)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=np.zeros(1, np.int64),
                  dx=g * ((x >= 0) & (x <= 1)), ties=ties)


def gradient(g, bits, noise, *, batch_axis=0):
    """Third part of the paper: g with uniform noise in +-1/(2L), quantized per sample."""
    g = double(g)
    _, L = unsigned_grid(bits)
    others = tuple(i for i in range(g.ndim) if i != batch_axis)
    M = np.abs(g).max(axis=others, keepdims=True)
    M_safe = np.where(M == 0, 1, M)
    return 2 * M * (round_half_even(np.clip(g / (2 * M_safe) + 0.5 + noise, 0, 1) * L) / L - 0.5)
