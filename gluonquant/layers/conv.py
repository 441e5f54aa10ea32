"""Quantized convolutions."""
from functools import partial

from mxnet.gluon import nn

from .. import functional as Q
from .base import QuantizedLayer, quantizes


class QuantizedConvolution(QuantizedLayer):
    """What quantized convolutions have in common."""

    @property
    def operator(self):
        """MXNet's name of the operator."""
        return self._op_name

    def linear(self, F, x, weight, bias):
        tensors = [x, weight] if bias is None else [x, weight, bias]
        return getattr(F, self.operator)(*tensors, **{**self._kwargs, 'no_bias': bias is None})


@quantizes(nn.Conv1D)
class QConv1D(QuantizedConvolution, nn.Conv1D):
    """`nn.Conv1D` with quantized input and weight."""


@quantizes(nn.Conv2D)
class QConv2D(QuantizedConvolution, nn.Conv2D):
    """`nn.Conv2D` with quantized input and weight, grouped and depthwise too."""


@quantizes(nn.Conv3D)
class QConv3D(QuantizedConvolution, nn.Conv3D):
    """`nn.Conv3D` with quantized input and weight."""


@quantizes(nn.Conv2DTranspose)
class QConv2DTranspose(QuantizedConvolution, nn.Conv2DTranspose):
    """`nn.Conv2DTranspose` with quantized input and weight; the weight's output channels are axis 1."""
    weight_axis = 1

    def float_forward(self, F, x, weight, bias):
        return self._computed(F, super().float_forward, x, weight, bias)

    def linear(self, F, x, weight, bias):
        return self._computed(F, super().linear, x, weight, bias)

    def _computed(self, F, forward, *tensors):
        if self.only_infers:
            return forward(F, *tensors)
        return Q.computed_deconvolution(F, partial(forward, F), *tensors)

    @classmethod
    def per_channel_supported(cls, layer):
        # With groups, axis 1 counts the channels of one group and several output channels share an index.
        return layer._kwargs['num_group'] == 1
