"""A small detector, built as gluoncv builds its own: a SymbolBlock, heads on its maps, another end in training."""
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn


class Body(nn.HybridBlock):
    """A small residual net whose middle is a feature map, too."""

    def __init__(self, up=False, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first = nn.Conv2D(8, 3, padding=1, use_bias=False, prefix='first_')
            self.norm = nn.BatchNorm()
            self.second = nn.Conv2D(8, 3, padding=1, use_bias=False, prefix='second_')
            self.norm2 = nn.BatchNorm()
            self.third = (nn.Conv2DTranspose if up else nn.Conv2D)(4, 3, strides=2, padding=1, prefix='third_')

    def hybrid_forward(self, F, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.norm2(self.second(x)))
        return x, F.relu(self.third(x))


class Detector(nn.HybridBlock):
    """Heads on the maps of a SymbolBlock; raw in training, decided in inference, as gluoncv's detectors are."""

    def __init__(self, up=False, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            body = Body(up, prefix='body_')
            maps = body(mx.sym.var('data'))
            self.features = gluon.SymbolBlock(mx.sym.Group(list(maps)), mx.sym.var('data'), body.collect_params())
            self.scores = nn.HybridSequential()
            self.places = nn.HybridSequential()
            for heads, channels in ((self.scores, 3), (self.places, 4)):
                for _ in range(2):
                    heads.add(nn.Conv2D(channels, 3, padding=1))

    def hybrid_forward(self, F, x):
        maps = self.features(x)
        scores, places = ([F.reshape(F.transpose(head(found), (0, 2, 3, 1)), shape=(0, -1, size))
                           for found, head in zip(maps, heads)]
                          for heads, size in ((self.scores, 3), (self.places, 4)))
        scores, places = F.concat(*scores, dim=1), F.concat(*places, dim=1)
        if autograd.is_training():
            return scores, places
        return F.softmax(scores).argmax(axis=-1), places


def pictures(seed=0):
    return nd.array(np.random.default_rng(seed).uniform(-1, 1, (4, 3, 8, 8)))


def made(net=None, values=True):
    """A `Detector`, or the net that is given, with the same values each time."""
    net = net or Detector()
    if values:
        mx.random.seed(0)
        net.initialize(mx.init.Normal(0.3))
        net(pictures())
        for name, parameter in net.collect_params('.*(gamma|var|beta|mean)$').items():
            parameter.set_data(nd.ones_like(parameter.data()) * name.endswith(('gamma', 'var')))
    return net


def outputs(net, x=None):
    return [out.asnumpy() for out in net(pictures(1) if x is None else x)]


def training_outputs(net, *targets):
    with autograd.record():
        out = net(pictures(1), *targets)
        loss = sum((part ** 2).sum() for part in out)
    loss.backward()
    return [part.asnumpy() for part in out]


def gradients(net, *targets):
    training_outputs(net, *targets)
    return {path: parameter.grad().asnumpy() for path, parameter in net._collect_params_with_prefix().items()
            if parameter.grad_req != 'null'}


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def assert_trains_alike(found, expected, slopes, expected_slopes):
    """Training outputs and gradients that are equal but for rounding."""
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert set(slopes) == set(expected_slopes)
    for path, slope in expected_slopes.items():
        np.testing.assert_allclose(slopes[path], slope, rtol=1e-3, atol=1e-3 * abs(slope).max() + 1e-6)
