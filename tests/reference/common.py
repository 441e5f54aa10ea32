"""What all references share: grids, half-to-even rounding, the float32 decision, undecidable points, EWGS.

Arithmetic is float64. Only the choice of a code is made as a float32 runtime makes it: a float32 scale and one float32
division. Scales, thresholds and state are rounded to float32 once, because that is how they are stored.
"""
from dataclasses import dataclass, field

import numpy as np

EPS = 1e-8
HALF = 1e-4             # distance to a half-integer below which float32 arithmetic may round the other way
EDGE = 1e-6             # relative distance to a clip edge below which float32 arithmetic may clip or not
EDGE_MEASURED = 1e-5    # the same when the edge is a sum over the data, which float32 accumulates with a larger error


@dataclass
class Result:
    """One forward and backward pass of a quantizer.

    y          fake-quantized x, float64
    codes      int64, x's shape; zeros where nothing was quantized
    scale      float64 holding float32 values, (1,) or (n_channels,); NaN where nothing was quantized
    zero_point int64, like scale; y = scale * (codes - zero_point) except for real offsets (LSQ+)
    dx         gradient of x, float64
    dparams    name -> gradient of the learnable value, float64
    state      name -> value after the forward, float64
    ties       True where float32 may legitimately choose the neighbouring code or the other side of a mask.
               Set g = 0 there before comparing gradients of parameters, which sum over all elements.
    """
    y: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    dx: np.ndarray
    dparams: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    ties: np.ndarray = None


def double(x):
    return np.asarray(x, dtype=np.float64)


def single(x):
    """Nearest float32 value, as float64."""
    return np.asarray(x, dtype=np.float64).astype(np.float32).astype(np.float64)


def vector(x):
    """A stored float32 parameter or state as a float64 vector."""
    return single(x).reshape(-1)


def divide(x, scale):
    """x / scale in float32, as float64."""
    with np.errstate(over='ignore', invalid='ignore'):
        return np.asarray(np.asarray(x, np.float32) / np.asarray(scale, np.float32), np.float64)


def round_half_even(v):
    return np.rint(v)       # NumPy's rint goes to even; MXNet's does not


def narrow_grid(bits):
    """Signed narrow grid (qmin, qmax) = (-Q, Q), Q = 2^(n-1) - 1."""
    if bits < 2:
        raise ValueError(f'the signed narrow grid needs bits >= 2, got {bits}')
    return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1


def full_grid(bits):
    """Signed full grid (qmin, qmax) = (-2^(n-1), 2^(n-1) - 1)."""
    if bits < 2:
        raise ValueError(f'the signed full grid needs bits >= 2, got {bits}')
    return -2 ** (bits - 1), 2 ** (bits - 1) - 1


def unsigned_grid(bits):
    """Unsigned grid (qmin, qmax) = (0, L), L = 2^n - 1."""
    if bits < 1:
        raise ValueError(f'the unsigned grid needs bits >= 1, got {bits}')
    return 0, 2 ** bits - 1


def rows(x, per_channel=False, axis=0):
    """x with one row for each scale: (n_channels, rest) or (1, all)."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) if per_channel else x.reshape(1, -1)


def spread(values, x, per_channel=False, axis=0):
    """Reshape one value per scale so that it broadcasts against x."""
    if not per_channel:
        return values.reshape((1,) * x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def per_tensor_only(method, per_channel):
    if per_channel:
        raise ValueError(f'{method} has one scale per tensor; per_channel is not defined for it')


def encode(v, qmin, qmax):
    """clip(R(v), qmin, qmax) as integers; NaN, which has no code, gets 0."""
    codes = np.clip(round_half_even(v), qmin, qmax)
    return np.where(np.isnan(codes), 0, codes).astype(np.int64)


def decode(x, values):
    """NaN and Inf of x are never hidden by quantization."""
    return np.where(np.isfinite(x), values, np.nan)


def zeros_like_scale(scale):
    return np.zeros(scale.shape, np.int64)


def near_half(v, decided=True, tolerance=HALF):
    """v close to a half-integer. One that is exact in float32 has one right answer (even) where `decided` holds."""
    distance = np.abs(v - np.floor(v) - 0.5)
    return (distance < tolerance) & ~((distance == 0) & decided)


def short(scale):
    """True for numbers of at most 12 significant bits: statistics of hand-made data, which float32 computes exactly."""
    mantissa = np.frexp(scale)[0] * 2 ** 12
    return mantissa == np.rint(mantissa)


def near_half_measured(v, scale, decided=False):
    """The same when the scale is a statistic, which float32 code may compute one or more ulps off.

    An exact half then has one right answer only for short scales, or where `decided` says so, and the tolerance grows
    with |v| because an error of the scale is relative.
    """
    return near_half(v, decided=short(scale) | decided, tolerance=HALF * np.maximum(1, np.abs(v) / 16))


def near_edge(x, edge, tolerance=EDGE):
    """x close to a clip edge but not on it; exact equality is decided by the inequality of the formula."""
    return (np.abs(x - edge) <= tolerance * np.abs(edge)) & (x != edge)


def ewgs_factor(g, v, q, qmin, qmax, delta):
    """dv / dq of element-wise gradient scaling: 1 + delta * sign(dq) * (clip(v) - q); delta = 0 or None is plain STE.

    sign(dq) = sign(g) since dq = g * scale and scale > 0.
    """
    if delta is None:
        return np.ones(g.shape)
    return 1 + delta * np.sign(g) * (np.clip(v, qmin, qmax) - q)


def gradient_mask(grad_mode, x, lower, upper):
    """1 for 'ste'; [lower <= x <= upper] for 'clip'."""
    if grad_mode == 'ste':
        return np.ones(x.shape)
    if grad_mode == 'clip':
        return ((lower <= x) & (x <= upper)).astype(np.float64)
    raise ValueError(f"grad_mode must be 'ste' or 'clip', got {grad_mode!r}")


def unquantized(x, g, state=None):
    """y = x: the delay, an empty batch, a state that was never set, or no quantizer."""
    x, g = double(x), double(g)
    return Result(y=x, codes=np.zeros(x.shape, np.int64), scale=np.full(1, np.nan), zero_point=np.zeros(1, np.int64),
                  dx=g.copy(), state=dict(state or {}), ties=np.zeros(x.shape, bool))
