"""The difference between a float layer and its quantized version."""
from .. import functional as Q

LAYERS = {}     # float class -> quantized class


def quantizes(float_class):
    """Class decorator: the quantized version of ``float_class``."""
    def enter(cls):
        LAYERS[float_class] = cls
        cls.float_class = float_class
        return cls
    return enter


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
            object.__delattr__(self, name)
        object.__delattr__(self, 'config')
        self.__class__ = self.float_class
        self._clear_cached_op()
        return self

    def hybrid_forward(self, F, x, weight, bias=None):
        out = super().hybrid_forward(F, self.input_quantizer(x), self.weight_quantizer(weight), bias)
        if self.config.gradient_bits is not None:
            out = Q.quantize_gradient(F, out, self.config.gradient_bits)
        return out

    @classmethod
    def per_channel_supported(cls, layer):
        """Whether each output channel of ``layer`` may have a scale of its own."""
        return True
