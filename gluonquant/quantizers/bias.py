"""Biases on the grid on which integer engines add them: that of the products of input and weight codes."""
from mxnet.gluon import HybridBlock

from .. import functional as Q
from .base import OBSERVE


class BiasQuantizer(HybridBlock):
    """b -> s R(b / s), s = input scale * weight scale * |factor|, for each output channel.

    Engines accumulate codes in int32 and add the bias there, so that it is a whole number of steps s. Where s = 0, the
    weights of a channel contribute nothing and b passes. Nothing is clipped: `gluonquant.finalize` names biases that
    int32 cannot hold.

    Parameters
    ----------
    activation, weight : Quantizer
        Those of the layer's input and weight, whose Parameters it reads; it has none of its own.

    Inputs:
        - **bias**: (channels,)
        - **weight**: the tensor in front of the weight quantizer.
        - **factor**: one number per channel behind the weight quantizer, of any shape; optional.
    Outputs: **out**: (channels,). Gradient: identity for the bias, none for scales.
    """
    grid = None         # 32 bits, which no `Grid` has

    def __init__(self, activation, weight):
        super().__init__(prefix='')
        self.__dict__.update(activation=activation, weight=weight)      # not our children: the net's

    def hybrid_forward(self, F, bias, weight, factor=None):
        unit, step = self.steps(F, bias, weight, factor)
        dead = step <= 0
        code = _round_half_even(F, F.BlockGrad(bias) / (step + dead))
        snapped = F.where(dead, F.BlockGrad(bias), code * step)
        on = F.ones_like(step)
        for quantizer in (self.activation, self.weight):
            on = F.broadcast_mul(on, _value(F, quantizer.mode, bias) > OBSERVE)
        self.__dict__['_now'] = unit, step + dead, on       # for `on_codes`, in the same pass
        return F.where(on, snapped, F.BlockGrad(bias)) + Q.zero_with_gradient(F, bias)

    def on_codes(self, F, layer, x, weight, bias, along_weight, along_output):
        """``layer(x, weight, bias)``, computed as engines do: sums of codes, which are exact, then one scale.

        Sums of dequantized numbers round at every term, and where such a sum lies next to a rounding tie, its code, and
        what depends on it, would differ from what is deployed. The other arguments are `batchnorm.Layer`'s.
        """
        unit, step, on = self._now
        codes = F.broadcast_div(weight, F.reshape(F.broadcast_div(step, unit), shape=along_weight))
        rounding = F.broadcast_mul(_round_half_even(F, codes) - codes, F.reshape(on, shape=along_weight))
        out = layer(F.broadcast_div(x, F.reshape(unit, shape=(1,) * len(along_output))), codes + F.BlockGrad(rounding),
                    bias / step)
        return F.broadcast_mul(out, F.reshape(step, shape=along_output))

    def steps(self, F, bias, weight, factor=None):
        """(input scale (1,), s (channels,))."""
        activation, scale = (F.reshape(self._levels(F, quantizer, tensor, bias), shape=(-1,))
                             for quantizer, tensor in ((self.activation, None), (self.weight, weight)))
        if not self.weight.per_channel:
            scale = F.broadcast_like(scale, bias)
        elif self.weight.group_size > 1:
            scale = F.repeat(scale, repeats=self.weight.group_size)
        if factor is not None:
            scale = scale * F.abs(F.reshape(factor, shape=(-1,)))
        return F.BlockGrad(activation), F.BlockGrad(F.broadcast_mul(scale, activation))

    @staticmethod
    def _levels(F, quantizer, tensor, like):
        fixed = {name: F.BlockGrad(_value(F, parameter, like)) for name, parameter in quantizer._reg_params.items()}
        rows = None if tensor is None else quantizer.rows(F, F.BlockGrad(tensor))
        return quantizer.levels_in_use(F, rows, fixed)[0]


def _round_half_even(F, x):
    """For numbers of any size, unlike that of `functional`: biases reach 2**31."""
    floor = F.floor(x)
    rest = x - floor
    odd = floor - 2 * F.floor(floor / 2)
    return floor + (rest > 0.5) + (rest == 0.5) * odd


def _value(F, parameter, like):
    return parameter.var() if hasattr(like, 'list_arguments') else parameter.data(like.context)
