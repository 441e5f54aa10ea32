"""Small nets, and one fused convolution by itself, beside exact integer arithmetic."""
import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.mxnet_int8 import block, chain, layers
from gluonquant.mxnet_int8.forms import LIMITS, Codes, Form
from gluonquant.mxnet_int8.writer import Writer
from gluonquant.symbol_graph import VARIABLE, Entry, Node


class Net(nn.HybridBlock):
    """A convolution with BatchNorm and ReLU, ``body(F, x, net)``, average pooling, a fully connected layer."""

    def __init__(self, body):
        super().__init__(prefix='net_')
        self.body = body
        with self.name_scope():
            self.stem, self.norm, self.out = nn.Conv2D(16, 3, padding=1), nn.BatchNorm(), nn.Dense(10)
            self.a, self.d = nn.Conv2D(16, 3, padding=1), nn.Conv2D(16, 3, padding=1)
            self.b, self.c, self.e = nn.Conv2D(16, 1), nn.Conv2D(16, 1), nn.Conv2D(16, 1)
            self.a_norm, self.b_norm = nn.BatchNorm(), nn.BatchNorm()
            self.depthwise = nn.Conv2D(16, 3, padding=1, groups=16)
            self.grouped = nn.Conv2D(32, 3, padding=1, strides=2, groups=4)
            self.dense, self.up = nn.Dense(20), nn.Conv2DTranspose(16, 2, strides=2)

    def hybrid_forward(self, F, x):
        x = self.body(F, F.relu(self.norm(self.stem(x))), self)
        return self.out(F.Pooling(x, global_pool=True, pool_type='avg', kernel=(1, 1)))


def residual(F, x, net):
    """A downsampling block of ResNet, its identity block, and one without ReLU."""
    x = F.relu(net.a_norm(net.a(x)) + net.b_norm(net.b(x)))
    x = F.relu(net.c(x) + x)
    return net.depthwise(net.d(x) + net.e(x))


def data(rng, count=8):
    """A batch of images."""
    return nd.array(rng.standard_normal((count, 3, 16, 16)))


def quantized(body, rng, target='onednn', **options):
    """(net, batch): calibrated, with BatchNorm that has seen data."""
    net = Net(body)
    net.initialize(mx.init.Xavier(), force_reinit=True)
    x = data(rng)
    with autograd.train_mode():
        net(x)
    nd.waitall()
    net = gq.attach(net, target=target, **{'bits': 8, 'method': 'int8', **options})
    gq.calibrate(net, [x, data(rng)], batches=2)
    return net, x


class Fused:
    """One fused convolution, 3 by 3, of random codes, with a quantizer behind it.

    ``run`` gives its codes as MXNet computes them, ``exact`` as integers and float64 do.
    """

    def __init__(self, rng, dtype='uint8', out='uint8', rest=None, groups=1, most=127):
        self.scale, self.dtype, self.out, self.groups = 0.0213, dtype, out, groups
        self.x = rng.integers(LIMITS[dtype][0], LIMITS[dtype][1] + 1, (2, 16, 9, 9))
        weight = rng.integers(-most + 1, most, (32 if groups == 1 else 16, 16 // groups, 3, 3))
        weight.reshape(len(weight), -1)[:, 4] = most
        step = rng.uniform(0.001, 0.01, len(weight)).astype(np.float32).astype(np.float64)
        self.bias = rng.integers(-9000, 9000, len(weight)) * step * self.scale
        self.weight = layers.Weight(weight, step, self.bias)
        sums = self._sums(0)
        scale = 2.5 * sums.std() / LIMITS[out][1]
        self.form = Form(scale, out, *LIMITS[out], 0, 0, scale, 0.0)
        self.rest_type, self.rest = rest, None
        if rest is not None:
            self.rest = rng.integers(LIMITS[rest][0], LIMITS[rest][1] + 1, sums.shape)

    def _sums(self, rest):
        attrs = {'kernel': (3, 3), 'pad': (1, 1), 'num_filter': len(self.bias), 'num_group': self.groups}
        x, weight = (nd.array(array, dtype='float64') for array in (self.x, self.weight.codes))
        out = nd.Convolution(x, weight, no_bias=True, **attrs).asnumpy()
        return out * (self.weight.step * self.scale).reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1) + rest

    def exact(self):
        rest = 0 if self.rest is None else self.rest * self.form.scale
        return np.clip(np.rint(self._sums(rest) / self.form.scale), self.form.low, self.form.high)

    def run(self):
        writer, names = Writer(), ['x'] if self.rest is None else ['x', 'rest']
        variables = {name: writer.add(VARIABLE, name, []) for name in names}
        types = {'x': self.dtype, 'rest': self.rest_type}
        scales = {'x': self.scale, 'rest': self.form.scale}
        forms = {name: Form(scales[name], types[name], 0, 0, 0, 0, scales[name], 0.0) for name in names}
        stored = {name: Codes(writer.encoded(entry, f'{name}_codes', forms[name]), scales[name], types[name])
                  for name, entry in variables.items()}
        attrs = {'kernel': '(3, 3)', 'pad': '(1, 1)', 'num_filter': str(len(self.bias)), 'num_group': str(self.groups)}
        node = Node('Convolution', 'conv', attrs, [Entry(variables['x'].node)], [])
        found = chain.Chain(node, None, None, self.form, [])
        made, _ = layers.fused(writer, found, stored['x'], self.weight, stored.get('rest'))
        net = block.make([made], writer.constants, names)
        given = {'x': self.x * self.scale, 'rest': None if self.rest is None else self.rest * self.form.scale}
        return net(*(nd.array(given[name]) for name in names)).asnumpy()

    def equal(self):
        """Share of equal codes."""
        return (self.run() == self.exact()).mean()
