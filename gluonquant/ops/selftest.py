"""Does the layout tier compute what the portable one does, in the layouts that this machine's convolutions use?

Two small nets made of symbols, convolution - normalization - quantizers - convolution, go forward and backward through
both tiers. One width fills oneDNN's blocks of 8 and 16 channels, the other leaves padding.
"""
import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from .call import fake_quantize

_WIDTHS = (16, 20)
_SCALARS = {'mode': 2.0, 'frozen': 0.0, 'alpha': 0.9, 'initialized': 1.0, 'scale': 0.2, 'amax': 1.5}


def check():
    """Raise AssertionError unless outputs and gradients of the two tiers agree."""
    for width in _WIDTHS:
        expected, actual = (_run(prefix, width) for prefix in ('_gluonquant_', '_gluonquant_blocked_'))
        for name, value in expected.items():
            if not np.allclose(actual[name], value, rtol=1e-5, atol=1e-6):
                raise AssertionError(f'{name} with {width} channels is off by up to '
                                     f'{np.abs(actual[name] - value).max():.3g}')


def _symbol(prefix, width):
    F = mx.sym

    def scalars(*names):
        return {name: F.var(name, shape=(1,)) for name in names}

    def weight(name, inputs):
        shape = (width, inputs, 3, 3)
        return fake_quantize(F, prefix + 'weight', {'data': F.var(name, shape=shape), **scalars('mode', 'frozen')},
                             method='int8', qmin=-7, qmax=7, signed=True, axis=0)

    def convolve(x, name, inputs):
        return F.Convolution(x, weight(name, inputs), num_filter=width, kernel=(3, 3), pad=(1, 1), no_bias=True)

    x = convolve(F.var('x'), 'first', 3)
    pact = fake_quantize(F, prefix + 'activation', {'data': x, **scalars('mode', 'frozen', 'alpha', 'initialized')},
                         method='pact', qmin=0, qmax=15, low=0.0, high=float('inf'), relu=True)
    y = convolve(pact, 'second', width)
    lsq = fake_quantize(F, prefix + 'activation',
                        {'data': y, **scalars('mode', 'frozen', 'scale', 'initialized'), 'other': x},
                        method='lsq', qmin=-8, qmax=7, signed=True)
    return F.Group([convolve(lsq, 'third', width), y])


def _run(prefix, width):
    with mx.name.NameManager():             # nor the user's numbering of unnamed operators
        symbol = _symbol(prefix, width)
    rng = np.random.RandomState(width)      # not the user's generator
    shapes = dict(zip(symbol.list_arguments(), symbol.infer_shape(x=(2, 3, 9, 7))[0]))
    arguments = {name: nd.array([_SCALARS[name]]) if name in _SCALARS else nd.array(rng.randn(*shape))
                 for name, shape in shapes.items()}
    learned = [name for name in shapes if name not in ('mode', 'frozen', 'initialized')]
    for name in learned:
        arguments[name].attach_grad()
    graph = mx.nd.CachedOp(symbol)
    with autograd.record():
        outputs = graph(*(arguments[name] for name in symbol.list_inputs()))
    autograd.backward(list(outputs))
    return {**{f'output {i}': out.asnumpy() for i, out in enumerate(outputs)},
            **{f'the gradient of {name}': arguments[name].grad.asnumpy() for name in learned}}
