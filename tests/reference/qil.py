"""QIL: a learned interval of |w| (or x) is quantized, what is below is pruned, what is above is clipped
(Jung et al. 2018, arXiv:1808.05779).

p = c - d, t = c + d, u = (|w| - p) / (2d), hat = 0 below p, 1 above t, else u^gamma
weights      code = sign(w) R(hat q), q = 2^(n-1) - 1, y = r code / q
activations  code = R(hat q), q = 2^n - 1, y = r code / q; no sign, no gamma
r = 1 (paper) or r = t (rescale=True).
"""
import numpy as np

from . import observers
from .common import (
    EDGE,
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    narrow_grid,
    near_half,
    per_tensor_only,
    single,
    unquantized,
    unsigned_grid,
    vector,
)


def weight(x, g, bits, *, per_channel=False, axis=0, params=None, state=None, rescale=True):
    x, g = double(x), double(g)
    per_tensor_only('qil', per_channel)
    if x.size == 0:
        return unquantized(x, g)
    gamma = vector(params['gamma'])[0] if 'gamma' in params else 1.0
    return _interval(x, g, np.abs(x), np.sign(x), gamma, narrow_grid(bits)[1], params, rescale, learn_gamma=True)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, rescale=True):
    x, g = double(x), double(g)
    if signed:
        raise ValueError('qil activations are unsigned')
    if x.size == 0:
        return unquantized(x, g)
    return _interval(x, g, x, np.ones(x.shape), 1.0, unsigned_grid(bits)[1], params, rescale, learn_gamma=False)


def _interval(x, g, a, S, gamma, q, params, rescale, learn_gamma):
    c, d = vector(params['center'])[0], max(vector(params['distance'])[0], EPS)
    p, t = single(c - d), single(c + d)
    u = (a - p) / (2 * d)

    # the decision in float32: hat * q
    hat = np.clip(divide(single(a - p), single(2 * d)), 0, 1) ** gamma
    v = single(hat * q)
    codes = S.astype(np.int64) * encode(v, 0, q)
    r = t if rescale else 1.0
    scale = single([r / q])

    M = (p <= a) & (a <= t)
    U = np.maximum(u, 1e-6)
    B = M * gamma * U ** (gamma - 1)
    dx = r * g * B * 0.5 / d
    dc = r * np.sum(g * S * B * (-0.5 / d))
    dd = r * np.sum(g * S * B * (-0.5 * (a - c) / d ** 2))
    dgamma = r * np.sum(g * S * M * U ** gamma * np.log(U))
    if rescale:
        E = np.sum(g * codes / q)
        dc, dd = dc + E, dd + E
    dparams = {'center': dc.reshape(1), 'distance': dd.reshape(1)}
    if learn_gamma:
        dparams['gamma'] = dgamma.reshape(1)

    if gamma == 1:          # the deployed encoder divides by 2d / q instead; an exact half must be one in both forms
        encoder = np.clip(divide(single(a - p), single(2 * d / q)), 0, q)
        ties = near_half(v) | near_half(encoder) | (encode(encoder, 0, q) != np.abs(codes)) & (S != 0)
    else:
        ties = near_half(v, decided=False)
    for edge in (p, t):     # p = c - d cancels, hence an error relative to t
        ties |= (np.abs(a - edge) <= EDGE * t) & (a != edge)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=np.zeros(1, np.int64), dx=dx,
                  dparams=dparams, ties=ties)


def initial(x, bits, role, signed=False, *, percentile=99.9, use_mse=None):
    """p = 0, c = d = t0 / 2, gamma = 1.

    t0: weights max|w| for bits >= 4, the MSE range below; activations the percentile, or the MSE range if use_mse.
    """
    x = double(x)
    if role == 'weight':
        use_mse = bits <= 3 if use_mse is None else use_mse
        t0 = observers.mse(x, *narrow_grid(bits)) if use_mse else np.abs(x).max()
    else:
        t0 = observers.mse(x, *unsigned_grid(bits)) if use_mse else observers.percentile(x, percentile, signed=False)
    half = single([max(t0, EPS) / 2])
    params = {'center': half, 'distance': half.copy()}
    if role == 'weight':
        params['gamma'] = np.ones(1)
    return params
