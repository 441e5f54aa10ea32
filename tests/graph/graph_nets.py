"""Nets for the tests of graphs, and how these tests read what stands in the graph of an attached net."""
import mxnet as mx
import numpy as np
from mxnet import autograd, init, nd
from mxnet.gluon import nn

from gluonquant.layers import quantizers
from gluonquant.symbol_graph import QUANTIZE

STATIC = {'static_alloc': True, 'static_shape': True}


class Net(nn.HybridBlock):
    """What ``function(net, F, *inputs)`` computes with ``layers``, which become attributes of the net."""

    def __init__(self, function, prefix='net_', **layers):
        super().__init__(prefix=prefix)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def hybrid_forward(self, F, x, *args, **parameters):
        return self.function(self, F, x, *args, **parameters)


class Residual(nn.HybridBlock):
    """conv - norm - relu - conv, added to a convolution of its input or to the input itself; relu."""

    def __init__(self, channels, shortcut=True, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first, self.norm = nn.Conv2D(channels, 3, padding=1, use_bias=False), nn.BatchNorm()
            self.second = nn.Conv2D(channels, 3, padding=1)
            self.shortcut = nn.Conv2D(channels, 1) if shortcut else None

    def hybrid_forward(self, F, x):
        y = self.second(F.relu(self.norm(self.first(x))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def small(ran=True, prefix='net_'):
    """conv - norm - relu - max-pool, two residual blocks, Dense; sizes of weights are known once it has run."""
    net = nn.HybridSequential(prefix=prefix)
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'), nn.MaxPool2D(), Residual(6),
                Residual(6, shortcut=False), nn.Dense(3))
    if ran:
        net.initialize(init.Xavier())
        net(images())
    return net


def ready(net, *inputs):
    """``net``, initialized and run once."""
    net.initialize(init.Xavier())
    net(*inputs)
    return net


def images(seed=0, count=2, size=8):
    return nd.array(np.random.default_rng(seed).uniform(-1, 1, (count, 3, size, size)))


def values(symbol, seed=0, **shapes):
    """Random values for the Parameters of a symbol, {name: array}, as suits their names."""
    rng = np.random.default_rng(seed)
    arguments, _, auxiliary = symbol.infer_shape(**shapes)
    found = {}
    names = [*symbol.list_arguments(), *symbol.list_auxiliary_states()]
    for name, shape in zip(names, [*arguments, *auxiliary]):
        if name.endswith('weight'):
            found[name] = nd.array(rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape))
        elif name not in shapes:
            found[name] = nd.ones(shape) if name.endswith(('gamma', 'var')) else nd.zeros(shape)
    return found


def train_step(net, *inputs):
    with autograd.record():
        out = net(*inputs)
    autograd.backward(out)
    nd.waitall()


def train(net, steps=1, size=1.0):
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.05, 'momentum': 0.9}, kvstore=None)
    for seed in range(steps):
        with autograd.record():
            loss = (net(size * images(seed)) ** 2).mean()
        loss.backward()
        trainer.step(1)
    nd.waitall()
    return net


def node(net, name):
    """The operator that messages and `explain` call ``name``."""
    return next(node for node in net.graph.nodes() if net.label(node) == name and node.op not in ('null', QUANTIZE))


def reads(net, name):
    """The inputs of an operator, 'Q(relu0)' where it reads relu0 behind a quantizer."""
    return [_text(net, entry) for entry in node(net, name).inputs]


def _text(net, entry):
    if entry.node.op == QUANTIZE:
        return f'Q({_text(net, entry.node.inputs[0])})'
    return net.label(entry.node) + (f'[{entry.index}]' if entry.index else '')


def settings(net, role='activation'):
    """{tensor, or path of a weight: 'lsq 4u'}: method, bits, u for unsigned and s for signed codes."""
    ending = {'activation': '.output_quantizer', 'weight': '_quantizer'}[role]
    assert all(path.endswith(ending) for path in quantizers(net, role))
    return {path[:-len(ending)]: f'{quantizer.method} {quantizer.grid.bits}{"s" if quantizer.grid.signed else "u"}'
            for path, quantizer in quantizers(net, role).items()}


def quantizer_of(net, name, slot=0):
    """The quantizer that an operator reads an input from, None for a float input."""
    return net.quantizer(node(net, name).inputs[slot])


def outputs(out):
    return [part for item in out for part in outputs(item)] if isinstance(out, (list, tuple)) else [out]


def same(actual, expected):
    """Assert that two nets have returned the same bits."""
    for mine, theirs in zip(outputs(actual), outputs(expected), strict=True):
        np.testing.assert_array_equal(mine.asnumpy(), theirs.asnumpy())
