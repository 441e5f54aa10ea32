"""Nets with BatchNorm for the tests of folding, and what these tests do to them."""
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import FoldedBatchNorm, named_blocks, quantizers

STATIC = {'static_alloc': True, 'static_shape': True}
LAYERS = ('Convolution', 'Deconvolution', 'FullyConnected')
WAYS = ('blocks', 'graph')


class Net(nn.HybridBlock):
    """What ``function(net, F, x)`` computes with ``layers``, which become attributes of the net."""

    def __init__(self, function, prefix='net_', **layers):
        super().__init__(prefix=prefix)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def hybrid_forward(self, F, x, *args):
        return self.function(self, F, x, *args)


def build(classes=3):
    """Convolutions, grouped and depthwise too, and Dense layers, with and without bias; not initialized."""
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation('relu'),
                nn.Conv2D(6, 3, strides=2, padding=1, groups=2), nn.BatchNorm(scale=False), nn.Activation('relu'),
                nn.Conv2D(6, 3, groups=6), nn.BatchNorm(epsilon=1e-3, momentum=0.8), nn.Activation('relu'),
                nn.Dense(5, use_bias=False), nn.BatchNorm(), nn.Activation('relu'), nn.Dense(classes))
    return net


NORMS = {'1': '0', '4': '3', '7': '6', '10': '9'}       # path of a BatchNorm in it -> of the layer before it


def images(seed=0, count=4):
    return nd.array(np.random.default_rng(seed).uniform(-1, 1, (count, 3, 8, 8)))


def shaken(net, x, seed=0):
    """``net`` with values that ``seed`` tells, BatchNorm far from the identity: gamma of both signs, statistics near
    those of x."""
    net.initialize(force_reinit=True)
    net(x)
    rng = np.random.default_rng(seed)
    for name, parameter in net.collect_params().items():
        shape = parameter.shape
        if len(shape) > 1 and all(shape):
            parameter.set_data(nd.array(rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)))
        elif name.endswith('bias'):
            parameter.set_data(nd.array(rng.normal(0, 0.5, shape)))
    norms = [block for _, block in named_blocks(net) if isinstance(block, nn.BatchNorm)]
    momenta = [norm._kwargs['momentum'] for norm in norms]
    for norm in norms:
        norm._kwargs['momentum'] = 0.0
        shape = norm.gamma.shape
        if not norm._kwargs['fix_gamma']:       # MXNet writes 1 into one that is fixed
            norm.gamma.set_data(nd.array(rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape)))
        norm.beta.set_data(nd.array(rng.normal(0, 0.5, shape)))
    with autograd.record():
        loss = sum(out.sum() for out in outputs(net(x)))
    loss.backward()         # MXNet writes running statistics in the backward pass
    nd.waitall()
    for norm, momentum in zip(norms, momenta):
        norm._kwargs['momentum'] = momentum
        mean, var = norm.running_mean.data().asnumpy(), norm.running_var.data().asnumpy()
        var = np.maximum(var, 0.3 * var.mean())     # a dead channel would make rounding errors large
        norm.running_mean.set_data(nd.array(mean + rng.normal(0, 0.1, mean.shape) * np.sqrt(var)))
        norm.running_var.set_data(nd.array(var * rng.uniform(0.7, 1.4, var.shape)))
    return net


def small(seed=0, **kwargs):
    """`build`, shaken."""
    return shaken(build(**kwargs), images(99, 16), seed)


def quantized(way, net=None, calibrate=True, **options):
    """``net`` (default: `small`) converted, or attached with quantizers in the same places."""
    net = small() if net is None else net
    options = {'method': 'int8', 'bits': 8, **options}
    net = gq.convert(net, **options) if way == 'blocks' else gq.attach(net, ops=LAYERS, **options)
    if calibrate:
        gq.calibrate(net, [images(1)])
        net(images(1))
    return net


def outputs(out):
    return [part for item in out for part in outputs(item)] if isinstance(out, (list, tuple)) else [out]


def run(net, x):
    return [out.asnumpy() for out in outputs(net(x))]


def step(net, x=None, g=None):
    """(output, {path: gradient}, {path: running statistics}) of one forward and backward pass."""
    x = images(2) if x is None else x
    with autograd.record():
        out = net(x)
    out.backward(nd.array(np.random.default_rng(5).normal(size=out.shape)) if g is None else g)
    nd.waitall()
    parameters = net._collect_params_with_prefix()
    return (out.asnumpy(), {path: parameter.grad().asnumpy() for path, parameter in parameters.items()
                            if parameter.grad_req != 'null' and 'quantizer' not in path},
            {path: value for path, value in state(net).items() if 'running' in path})


def losses(net, steps=4, lr=0.05):
    """The losses of some steps of SGD on changing images."""
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': lr, 'momentum': 0.9}, kvstore=None)
    found = []
    for seed in range(steps):
        with autograd.record():
            loss = (net(images(seed)) ** 2).mean()
        loss.backward()
        trainer.step(1)
        found.append(loss.asscalar())
    nd.waitall()
    return found


def state(net):
    nd.waitall()
    return {name: p._reduce().asnumpy() for name, p in net._collect_params_with_prefix().items() if p._data is not None}


def codes(net):
    """{path of a weight quantizer: codes}"""
    found = {path: quantizer for path, quantizer in quantizers(net, 'weight').items() if quantizer.grid is not None}
    return {path: quantizer.quantize(quantizer.source).asnumpy() for path, quantizer in found.items()}


def remaining(net):
    """How many BatchNorms of ``net`` normalize by themselves, in the graph that runs."""
    if isinstance(net, gq.graph.GraphNet):
        return sum(node.op == 'BatchNorm' for node in net.graph.nodes())
    return sum(isinstance(block, nn.BatchNorm) and not isinstance(block, FoldedBatchNorm)
               for _, block in named_blocks(net))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def assert_near(actual, expected, tolerance):
    """Differences count in units of the largest expected value."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_near_on_a_grid(actual, expected, tolerance=1e-5, share=0.02):
    """The same but for a few values: somewhere before them a number near a tie was rounded the other way."""
    far = np.abs(actual - expected) > tolerance * np.abs(expected).max()
    assert far.mean() <= share
    assert_near(actual, expected, 0.05)
