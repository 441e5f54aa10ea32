"""The quantized fully connected layer."""
from mxnet.gluon import nn

from .base import QuantizedLayer, quantizes


@quantizes(nn.Dense)
class QDense(QuantizedLayer, nn.Dense):
    """`nn.Dense` with quantized input and weight."""
