"""No quantization: the place of a quantizer, empty."""
from mxnet.gluon import HybridBlock

from .registry import activation, weight


class Identity(HybridBlock):
    """x -> x. Has the interface of a quantizer, no Parameters and no grid."""
    grid = None
    calibrated = True
    marker = None
    signed_supported = True
    default_range = False
    bound = None

    def __init__(self, bits=None, signed=None, per_channel=None, axis=0, shape=None, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self.nested = False
        self.where = self.name
        self.tensors = []

    def bind(self, weight, read=None):
        """Nothing to remember."""

    def hybrid_forward(self, F, x):
        return x if self.nested else F.identity(x)      # a graph by itself needs an operator

    def qparams(self, x=None):
        """RuntimeError: a tensor that is not quantized has neither scale nor zero point."""
        raise RuntimeError(f'{self.where} does not quantize: it has no scale and no zero point')

    def quantize(self, x):
        """RuntimeError, as `qparams`."""
        raise RuntimeError(f'{self.where} does not quantize: it has no codes')

    def require_range(self):
        """Nothing is required."""

    def renew(self):
        """Nothing to set."""

    def freeze(self):
        """Nothing to freeze."""

    unfreeze = freeze

    def set_mode(self, mode):
        """Nothing to switch."""


@weight('none')
class WeightIdentity(Identity):
    """`Identity` in front of a weight."""
    role = 'weight'


@activation('none')
class ActivationIdentity(Identity):
    """`Identity` in front of a layer's input."""
    role = 'activation'
