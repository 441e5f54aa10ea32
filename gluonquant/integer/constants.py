"""What a layer's Parameters become when they are deployed: codes and scales, in float32, rounded as in training."""
import numpy as np

F32 = np.float32
INT32 = 2 ** 31 - 1


def absorb(codes, scale, factor=None):
    """(codes, scale) of a weight that is multiplied by one ``factor`` per output channel, as a merged BatchNorm does.

    Codes stay, but for their sign where the factor is negative. Where it is 0, they are 0.

    Parameters
    ----------
    codes : int32 array (channels, ...)
    scale : float32 array (1,) or (channels,)
    factor : float32 array of ``channels`` elements, optional
    """
    if factor is None:
        return codes, np.asarray(scale, F32)
    factor = np.asarray(factor, F32).reshape(-1)
    signs = np.sign(factor).astype(codes.dtype).reshape([-1] + [1] * (codes.ndim - 1))
    return codes * signs, np.asarray(scale, F32) * np.abs(factor)


def bias_codes(bias, activation_scale, weight_scale):
    """(codes, weight scale): a bias in steps of activation_scale * weight_scale, as float64 integers of any size.

    A channel of scale 0 has weights that contribute nothing; it gets a scale on which its bias is 2**22 steps.
    """
    bias, weight_scale = np.asarray(bias, F32), np.broadcast_to(np.asarray(weight_scale, F32), np.shape(bias)).copy()
    dead = F32(activation_scale) * weight_scale <= 0
    weight_scale[dead] = np.where(bias[dead] == 0, 1, np.abs(bias[dead]) / F32(2 ** 22) / F32(activation_scale))
    steps = F32(activation_scale) * weight_scale
    return np.rint((bias / steps).astype(F32)).astype(np.float64), weight_scale
