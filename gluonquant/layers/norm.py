"""BatchNorm in the layer before it: what that changes about the two blocks, without their values."""
import mxnet as mx
from mxnet.gluon import ParameterDict, nn


class FoldedBatchNorm(nn.BatchNorm):
    """Passes x on: the layer before it does its work. A BatchNorm becomes one by changing its class."""
    _kept = None

    @classmethod
    def from_float(cls, norm, channels):
        """Turn ``norm``, an `nn.BatchNorm` over ``channels`` channels, into a folded one; returns it."""
        for parameter in norm._reg_params.values():
            parameter.shape = (channels,)
            parameter._finish_deferred_init()
        norm._clear_cached_op()
        norm._float_class, norm.__class__ = type(norm), cls
        return norm

    def to_float(self):
        """Undo `from_float`, and `drop`; returns the BatchNorm."""
        if self._kept is not None:
            self._reg_params, self._params = self.__dict__.pop('_kept')
        self.__class__ = self.__dict__.pop('_float_class')
        self._clear_cached_op()
        return self

    def drop(self):
        """Forget the Parameters: they have been merged into the layer."""
        self._kept = self._reg_params, self._params
        self._reg_params, self._params = {}, ParameterDict(self.params.prefix)

    def values(self, F, x):
        """gamma, beta, mean and variance, as the layer that reads ``x`` needs them."""
        own = (self.gamma, self.beta, self.running_mean, self.running_var)
        return [parameter.data(x.context) if F is mx.nd else parameter.var() for parameter in own]

    def hybrid_forward(self, F, x, **parameters):
        return x


def fold_layer(layer, norm, how='folded'):
    """Put the BatchNorm ``norm`` into ``layer``, which is quantized or float.

    Parameters
    ----------
    how : 'folded', 'merged' or 'scaled'
        As in `LayerConfig`. The latter two take the Parameters of ``norm`` away and give the layer a bias and, for
        'scaled', a ``weight_factor``, which the caller has to set.
    """
    convolution = hasattr(layer, '_op_name')
    channels = layer._kwargs['num_filter'] if convolution else layer._units
    if isinstance(norm, FoldedBatchNorm):
        layer.unfold()
    else:
        FoldedBatchNorm.from_float(norm, channels)
    if how == 'folded':
        layer.fold(norm)
        return
    norm.drop()
    if layer.bias is None:
        _add_constant(layer, 'bias', (channels,), 'zeros', 'write')
        if convolution:
            layer._kwargs['no_bias'] = False
    if how == 'scaled':
        shape = tuple(channels if size == -1 else 1 for size in layer.geometry.along_weight)
        _add_constant(layer, 'weight_factor', shape, 'ones', 'null')


def _add_constant(layer, name, shape, init, grad_req):
    parameter = layer.params.get(name, shape=shape, init=init, grad_req=grad_req, dtype=layer.weight.dtype)
    if layer.weight._data is not None:
        parameter.initialize(ctx=layer.weight.list_ctx())
    setattr(layer, name, parameter)
    layer.__dict__['_added'] = (*layer.__dict__.get('_added', ()), name)


def remove_constants(layer):
    """Take away what `fold_layer` has added to a layer."""
    for name in layer.__dict__.pop('_added', ()):
        del layer.params._params[layer._reg_params.pop(name).name]
        layer.__dict__[name] = None
        if name == 'bias' and hasattr(layer, '_op_name'):
            layer._kwargs['no_bias'] = True
