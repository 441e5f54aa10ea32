"""Clipped ReLU with a fixed threshold: y = s R(clip(x, 0, threshold) / s), s = threshold / L; the constant case of PACT
(arXiv:1805.06085), as for ReLU6.

dx = g [0 <= x <= threshold]
"""
import numpy as np

from .common import (
    EPS,
    Result,
    decode,
    divide,
    double,
    encode,
    gradient_mask,
    near_edge,
    near_half,
    single,
    unquantized,
    unsigned_grid,
)


def activation(x, g, bits, *, signed=False, params=None, state=None, training=True, batch_axis=0, threshold=6.0):
    x, g = double(x), double(g)
    if signed:
        raise ValueError('cliprelu is unsigned')
    if x.size == 0:
        return unquantized(x, g)
    upper = single(max(threshold, EPS))
    qmin, qmax = unsigned_grid(bits)
    scale = single([upper / qmax])
    v = divide(np.clip(x, 0, upper), scale)
    codes = encode(v, qmin, qmax)
    return Result(y=decode(x, codes * scale), codes=codes, scale=scale, zero_point=np.zeros(1, np.int64),
                  dx=g * gradient_mask('clip', x, 0, upper), ties=near_half(v) | near_edge(x, upper))
