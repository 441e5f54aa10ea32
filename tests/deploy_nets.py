"""A small net with everything that deployment has to get right, and images for it."""
import mxnet as mx
import numpy as np
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq

SHAPE = (1, 3, 16, 16)


class Residual(nn.HybridBlock):
    """Stem, a residual sum with a convolution on both sides, poolings, a dense layer."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2D(channels, 3, padding=1, use_bias=False), nn.BatchNorm()
        self.main, self.main_norm = nn.Conv2D(channels, 3, padding=1), nn.BatchNorm()
        self.side = nn.Conv2D(channels, 1)
        self.out = nn.Dense(10)

    def hybrid_forward(self, F, x):
        x = F.Pooling(F.relu(self.stem_norm(self.stem(x))), kernel=(2, 2), stride=(2, 2), pool_type='max')
        x = F.relu(self.main_norm(self.main(x)) + self.side(x))
        return self.out(F.Pooling(x, global_pool=True, pool_type='avg', kernel=(1, 1)))


def images(count=8, seed=0):
    """float32 (count, 3, 16, 16)."""
    return np.random.RandomState(seed).randn(count, *SHAPE[1:]).astype(np.float32)


def float_net(channels=8, seed=0):
    """A net whose BatchNorms have seen something; some of their factors are negative."""
    mx.random.seed(seed)
    random = np.random.RandomState(seed)
    net = Residual(channels)
    net.initialize(mx.init.Xavier())
    net(nd.array(images()))
    for name, parameter in net._collect_params_with_prefix().items():
        if name.endswith('gamma'):
            parameter.set_data(nd.array(random.uniform(-1, 1.5, parameter.shape)))
        elif name.endswith(('beta', 'running_mean', 'bias')):
            parameter.set_data(nd.array(0.3 * random.randn(*parameter.shape)))
        elif name.endswith('running_var'):
            parameter.set_data(nd.array(random.uniform(0.5, 2, parameter.shape)))
    return net


def attached(bits=8, target='onnxruntime', net=None, **options):
    """The net, quantized and calibrated."""
    made = gq.attach(net or float_net(), bits, target=target, **options)
    gq.calibrate(made, [nd.array(images(seed=seed)) for seed in range(2)])
    gq.set_phase(made, True)
    return made


def converted(bits=8, **options):
    """The net behind `convert`."""
    net = float_net()
    gq.convert(net, bits, **options)
    gq.calibrate(net, [nd.array(images(seed=seed)) for seed in range(2)])
    return net
