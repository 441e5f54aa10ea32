"""The quantized fully connected layer."""
from mxnet.gluon import nn

from .base import QuantizedLayer, quantizes


@quantizes(nn.Dense)
class QDense(QuantizedLayer, nn.Dense):
    """`nn.Dense` with quantized input and weight."""
    operator = 'FullyConnected'

    def linear(self, F, x, weight, bias):
        tensors = [x, weight] if bias is None else [x, weight, bias]
        return F.FullyConnected(*tensors, no_bias=bias is None, num_hidden=self._units, flatten=self._flatten)
