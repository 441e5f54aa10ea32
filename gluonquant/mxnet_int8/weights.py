"""Float weights that MXNet rounds to given codes.

Its fused convolution quantizes the float weight itself when it first runs: it multiplies a channel by 127.5 / max|w|
and rounds half to even, so that the largest magnitude becomes 127, or -128. That one it is given as u steps, u near
127.5; the range of the data, a tensor, carries 127.5 / u and so takes the difference out again.
"""
import numpy as np

from .forms import STEPS

STEP = np.float32(STEPS['int8'])
LARGEST = (127.5, *(127.5 + sign * offset / 100 for offset in range(2, 48, 2) for sign in (1, -1)))     # u
ULPS = 2048
LARGEST_BIAS = 2 ** 30          # in steps of the sum: beyond it MXNet changes the weight's scale


def imposed(codes, step, data_scale, bias):
    """Weights for the fused convolution, or the reason why there are none.

    Parameters
    ----------
    codes : int array (channels, ...), -128 to 127
    step : float64 array (channels,)
    data_scale : float
    bias : float64 array (channels,)

    Returns
    -------
    (weights, factor, missed) or str
        float32 like ``codes``; what to multiply the range of the data by; how many codes -127 MXNet takes for -128,
        because 127.5 rounds so.
    """
    rows, sizes = codes.reshape(len(codes), -1).copy(), step.astype(np.float64).copy()
    for channel, row in enumerate(rows):
        if not row.any():       # one tap of next to no size keeps MXNet from a division by zero
            sizes[channel] = max(abs(bias[channel]) / data_scale, 1e-12) * 2.0 ** -29
            row[0] = 127
        times = filling(row)
        if times is None:
            return f'channel {channel} of the weight has codes from {row.min()} to {row.max()}, none of them 127'
        row *= times
        sizes[channel] /= times
    if (np.abs(bias) / (data_scale * sizes) >= LARGEST_BIAS).any():
        channel = (np.abs(bias) / sizes).argmax()
        return f'the bias of channel {channel} has {abs(bias[channel]) / (data_scale * sizes[channel]):.3g} steps'
    low, high = rows.min(axis=1), rows.max(axis=1)
    best = None
    for largest in LARGEST:
        most, missed = _nudged((largest * sizes).astype(np.float32), low == -128, (low == -127) & (high < 127))
        if best is None or missed < best[2]:
            best = most, largest, missed
        if not missed:
            break
    most, largest, missed = best
    values = (rows * sizes.reshape(-1, 1)).astype(np.float32)
    values = np.where((rows == 127) & (low > -128).reshape(-1, 1), most.reshape(-1, 1), values)
    values = np.where(rows == -128, -most.reshape(-1, 1), values)
    for channel in np.flatnonzero((low == -127) & (high < 127)):
        values[channel, rows[channel].argmin()] = -most[channel]
    return values.reshape(codes.shape), float(STEP) / largest, missed


def filling(row):
    """By what to multiply the codes of a channel so that they reach 127 or -128 but not beyond, or None."""
    low, high = -int(row.min()), int(row.max())
    if max(low, high) == 127:
        return 1
    if low > 0 and 128 % low == 0 and high * (128 // low) <= 127:
        return 128 // low
    return 127 if max(low, high) == 1 else None


def _nudged(values, reach, below):
    """Move ``values`` by at most 2e-4 of them until v * (127.5 / v) in float32 is at least 127.5, or less.

    Parameters
    ----------
    values : float32 array (channels,)
    reach, below : bool arrays (channels,): those to be at least 127.5, so that -128 is reached; those to be less.

    Returns
    -------
    (values, count of those in ``below`` that cannot be)
    """
    asked = np.flatnonzero(reach | below)
    offsets = np.array(sorted(range(-ULPS, ULPS + 1), key=abs), np.int32)
    tried = (values[asked].view(np.int32).reshape(-1, 1) + offsets).view(np.float32)
    product = tried * (STEP / tried)
    fits = np.where(below[asked].reshape(-1, 1), product < STEP, product >= STEP)
    values = values.copy()
    values[asked] = tried[np.arange(len(asked)), fits.argmax(axis=1)]
    return values, int((~fits.any(axis=1)).sum())
