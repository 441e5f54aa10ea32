"""The difference between a float layer and its quantized version."""
from functools import partial

import numpy as np
from mxnet import nd

from .. import functional as Q
from ..batchnorm import Layer, Settings, folded, folded_weight
from .norm import remove_constants

LAYERS = {}     # float class -> quantized class


def quantizes(float_class):
    """Class decorator: the quantized version of ``float_class``."""
    def enter(cls):
        LAYERS[float_class] = cls
        cls.float_class = float_class
        return cls
    return enter


class SharedInput:
    """Quantizes a tensor once for all layers that read it in a forward pass.

    A layer that has read as often as it does in one pass, and reads again, begins a new pass, even if one before
    ended midway.

    Parameters
    ----------
    uses : dict, {name of a reader: how often it reads in one pass}
    """

    def __init__(self, uses):
        self.uses = uses
        self._x = self._out = None
        self._left = {}

    def __call__(self, quantizer, x, reader):
        """The quantized x, for ``reader``."""
        if self._x is not x or not self._left[reader]:
            self._x, self._out, self._left = x, quantizer(x), dict(self.uses)
        self._left[reader] -= 1
        out = self._out
        if not any(self._left.values()):
            self._x = self._out = None
        return out


class QuantizedLayer:
    """Quantizes input and weight, then does what the float class does. Stands before that class among the bases.

    A float layer becomes quantized by changing its class (`from_float`): the object stays, so every reference its
    net holds, its Parameters, names, hooks and activation stay too, and `to_float` undoes it.

    Attributes
    ----------
    weight_quantizer, input_quantizer : Quantizer or Identity
    config : LayerConfig
    """
    weight_axis = 0         # the output channels of the weight
    _shared = None
    _norm = None            # the BatchNorm that is folded into the layer; no child of it
    only_infers = False     # no detours for the sake of gradients, in graphs that nobody trains
    weight_factor = None    # one number per channel behind the weight quantizer, where a BatchNorm was merged

    @classmethod
    def from_float(cls, layer, config, weight_quantizer, input_quantizer):
        """Turn ``layer``, an instance of ``cls.float_class``, into its quantized version; returns it.

        Parameters
        ----------
        config : LayerConfig
            Kept as ``layer.config``.
        weight_quantizer, input_quantizer : Block
            From `quantizers.create`; the input quantizer may serve several layers.
        """
        layer._clear_cached_op()
        layer.__class__ = cls
        layer.config = config
        layer.weight_quantizer = weight_quantizer
        layer.input_quantizer = input_quantizer
        weight_quantizer.bind(layer.weight)
        for quantizer in (weight_quantizer, input_quantizer):
            for parameter in quantizer.params.values():
                parameter.like = layer.weight
        return layer

    def to_float(self):
        """Undo `from_float`; returns the layer."""
        for name in ('weight_quantizer', 'input_quantizer'):
            del self._children[name]
        if self._norm is not None:
            self.unfold()
        remove_constants(self)
        for name in ('weight_quantizer', 'input_quantizer', 'config', '_shared'):
            self.__dict__.pop(name, None)
        self.__class__ = self.float_class
        self._clear_cached_op()
        return self

    def share_input(self, shared, name):
        """Read the input through ``shared``, a `SharedInput` that knows this layer by ``name``."""
        self._shared = shared, name

    def quantized_input(self, x):
        """x behind the input quantizer."""
        if self._shared is None:
            return self.input_quantizer(x)
        shared, name = self._shared
        return shared(self.input_quantizer, x, name)

    def hybrid_forward(self, F, x, weight, bias=None, weight_factor=None):
        x = self.quantized_input(x)
        if self._norm is not None:
            values = self._norm.values(F, x)
            out = folded(F, partial(self.linear, F), self.weight_quantizer, self.geometry,
                         Settings.of(self._norm._kwargs), x, weight, bias, *values, dtype=self.dtype)
        else:
            weight = self.weight_quantizer(weight)
            if weight_factor is not None:
                weight = F.broadcast_mul(weight, weight_factor)
            out = self.float_forward(F, x, weight, bias)
        if self.config.gradient_bits is not None:
            out = Q.quantize_gradient(F, out, self.config.gradient_bits)
        return out

    def float_forward(self, F, x, weight, bias):
        """What the float layer does."""
        return super().hybrid_forward(F, x, weight, bias)

    def linear(self, F, x, weight, bias):
        """The layer's operator alone, with a bias or None."""
        raise NotImplementedError

    @property
    def dtype(self):
        """The name of the weight's type."""
        return np.dtype(self.weight.dtype).name

    @property
    def geometry(self):
        """The `Layer` of the layer's operator."""
        return Layer.of(self.operator, getattr(self, '_kwargs', {}))

    def fold(self, norm):
        """Take in ``norm``, a `FoldedBatchNorm`: see `gluonquant.fold`."""
        self.__dict__['_norm'] = norm
        self.params.update({parameter.name: parameter for parameter in norm._reg_params.values()})
        self.weight_quantizer.bind(self.weight, self.folded_weight)

    def unfold(self):
        """Undo `fold`."""
        for parameter in self._norm._reg_params.values():
            del self.params._params[parameter.name]
        del self.__dict__['_norm']
        self.weight_quantizer.bind(self.weight)

    def folded_weight(self):
        """k w, an array."""
        norm = self._norm
        weight, gamma, var = (parameter.list_data()[0] for parameter in (self.weight, norm.gamma, norm.running_var))
        return folded_weight(nd, self.geometry, Settings.of(norm._kwargs), weight, gamma, var, self.dtype)

    @classmethod
    def per_channel_supported(cls, layer):
        """Whether each output channel of ``layer`` may have a scale of its own."""
        return True
