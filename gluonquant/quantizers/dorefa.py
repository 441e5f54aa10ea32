"""DoReFa: weights through tanh, activations on [0, 1] (Zhou et al. 2016, arXiv:1606.06160).

Differences from the paper: ``rescale='max'`` keeps the size of pre-trained weights; ties of the maximum share its
gradient. Gradient quantization, the paper's third part, is `quantize_gradient`, on a layer's output.
"""
from .. import functional as Q
from ..grid import Grid
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer
from .sawb import midrise_codes


@weight('dorefa')
class DoReFaWeight(WeightQuantizer):
    """w -> r * (2 R(L v) - L) / L, v = tanh(w) / (2 max|tanh w|) + 1/2; with one bit mean|w| * sign(w), sign(0) = 1.

    Gradient: through tanh and through the maximum (``detach_max=True``: the maximum is a constant); one bit: identity.

    Parameters
    ----------
    rescale : None (r = 1, as in the paper: a train-mode BatchNorm must follow) or 'max' (r = max|w|, a constant)
    """
    fused = 'dorefa'
    tracks = holds = False

    def __init__(self, bits=4, rescale=None, detach_max=False, **kwargs):
        self.check_bits(bits)
        if rescale not in (None, 'max'):
            raise ValueError(f"rescale={rescale!r}: pass None or 'max'")
        super().__init__(bits, Grid(bits, midrise=True), **kwargs)
        if self.per_channel:
            raise ValueError('per_channel=True: DoReFa weights have one scale for the whole tensor')
        self.rescale = rescale
        self.detach_max = detach_max

    def fused_options(self):
        return {**super().fused_options(), 'midrise': True, 'rescale': self.rescale == 'max', 'detach': self.detach_max}

    def levels(self, F, rows, fixed):
        magnitude = F.abs(rows)
        if self.grid.bits == 1:
            return Q.row_mean(F, magnitude), None
        largest = F.max(magnitude, axis=1, keepdims=True)
        return (largest if self.rescale == 'max' else largest > 0) / self.grid.steps, None

    def codes(self, F, rows, scale, zero_point, fixed):
        if self.grid.bits == 1:
            return 2 * (rows >= 0) - 1
        t = F.tanh(rows)
        largest = F.maximum(F.max(F.abs(t), axis=1, keepdims=True), Q.EPS)
        v = F.broadcast_div(t, 2 * largest) + 0.5
        return midrise_codes(F, v * self.grid.steps, self.grid.steps)

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        if self.grid.bits == 1:
            return Q.zero_with_gradient(F, rows)
        t = F.tanh(rows)
        magnitude = F.abs(t)
        constant = F.BlockGrad(magnitude)
        largest = F.max(constant, axis=1, keepdims=True)
        if not self.detach_max:
            ties = F.broadcast_equal(constant, largest)
            share = F.broadcast_div(ties, F.sum(ties, axis=1, keepdims=True))
            largest = largest + Q.zero_with_gradient(F, F.sum(magnitude * F.BlockGrad(share), axis=1, keepdims=True))
        smooth = F.broadcast_mul(F.broadcast_div(t, F.maximum(largest, Q.EPS)), scale * self.grid.steps)
        return F.broadcast_mul(Q.zero_with_gradient(F, smooth), on) + F.broadcast_mul(
            Q.zero_with_gradient(F, rows), 1 - on)


@activation('dorefa')
class DoReFaActivation(ActivationQuantizer):
    """x -> R(clip(x, 0, 1) * L) / L. Gradient: g where 0 <= x <= 1.

    For nets whose activations have about unit range; pre-trained ones want `PACT`. No range to calibrate.
    """
    fused = 'dorefa'
    signed_supported = False
    grad_mode = 'clip'

    def __init__(self, bits=4, signed=None, **kwargs):
        self.check_bits(bits)
        if signed:
            raise ValueError('signed=True: DoReFa activations live on [0, 1]; use pact or lsq for signed inputs')
        super().__init__(bits, Grid(bits, signed=False), **kwargs)

    def levels(self, F, rows, fixed):
        return F.ones((1, 1)) / self.grid.steps, None

    def codes(self, F, rows, scale, zero_point, fixed):
        return Q.round_half_even(F, Q.limit(F, rows, 0, 1) * self.grid.steps)

    def bounds(self, F, scale, zero_point, fixed):
        return F.zeros((1, 1)), F.ones((1, 1))
