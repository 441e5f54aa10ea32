"""LSQ+: a learned offset for activations, and better starting points (Bhalgat et al. 2020, arXiv:2004.09576).

activations  v = (x - b) / s, code = clip(R(v), 0, L), y = code s + b
             dx = g [0 < v < L], ds = G sum g r as in LSQ, db = G sum g (1 - [0 < v < L])
weights      LSQ, started at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(n-1)
"""
import numpy as np

from . import lsq
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
    round_half_even,
    single,
    unquantized,
    unsigned_grid,
    vector,
)

weight = lsq.weight


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, nudge_offset=False,
               ewgs=None):
    """`signed` changes nothing: the offset takes its place.

    zero_point is the exported one, clip(R(-b / s), 0, L); with nudge_offset the forward uses b = -zero_point * s.
    """
    x, g = double(x), double(g)
    if x.size == 0:
        return unquantized(x, g)
    qmin, L = unsigned_grid(bits)
    s = np.maximum(vector(params['scale']), single(EPS))
    b = vector(params['offset'])
    zero_point = encode(divide(-b, s), qmin, L)
    if nudge_offset:
        b = single(-zero_point * s)
    v = divide(single(x - b), s)                            # a float32 difference, then a float32 quotient
    codes = encode(v, qmin, L)

    inside = (qmin < v) & (v < L)
    f = ewgs_factor(g, (x - b) / s, codes, qmin, L, ewgs)
    r = np.where(v <= qmin, qmin, np.where(v >= L, L, codes - f * ((x - b) / s)))
    G = 1 / np.sqrt(x.size // x.shape[batch_axis] * L)
    ds = G * np.sum(g * r)
    db = G * np.sum(g * (1 - f * inside))
    ties = near_half(np.clip(v, qmin, L)) | near_edge(v, L)
    return Result(y=decode(x, codes * s + b), codes=codes, scale=s, zero_point=zero_point, dx=g * f * inside,
                  dparams={'scale': ds.reshape(1), 'offset': db.reshape(1)}, ties=ties)


def initial(x, bits, role, signed=False, *, refine=True):
    """Activations: the range [min, max] times the factor of 0.2..1 of least squared error. Weights: 3 sigma."""
    x = double(x)
    if role == 'weight':
        full_grid(bits)
        mu, sigma = x.mean(), x.std()
        return {'scale': single([max(abs(mu - 3 * sigma), abs(mu + 3 * sigma), EPS) / 2 ** (bits - 1)])}
    _, L = unsigned_grid(bits)
    factors = 0.2 + 0.8 * np.arange(100) / 99 if refine else [1.0]
    best = None
    for factor in factors:
        b = factor * x.min()
        s = max(factor * (x.max() - x.min()) / L, EPS)
        error = np.sum((np.clip(round_half_even((x - b) / s), 0, L) * s + b - x) ** 2)
        if best is None or error < best[0]:
            best = error, s, b
    return {'scale': single([best[1]]), 'offset': single([best[2]])}
