"""Trains a small quantized net for 20 steps as one worker of a job, or alone, and writes its values.

    python joint_batch.py FILE METHOD           batches of 64, divided among the workers
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / 'recipes'), str(Path(__file__).parents[2])]

import cluster  # noqa: E402

MEMBER = cluster.join()

# ruff: noqa: E402
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import layers
from workers import Workers

METHODS = {'lsq': 'lsq', 'pact': 'sawb', 'int8': 'int8'}


def main(path, method):
    random = np.random.default_rng(0)
    data = [(random.normal(size=(64, 3, 6, 6)).astype('float32'), random.integers(0, 4, 64)) for _ in range(20)]
    workers = Workers('dist_sync' if MEMBER else 'device', member=MEMBER)
    net = nn.HybridSequential(prefix='net_')
    net.add(nn.Conv2D(8, 3, in_channels=3, use_bias=False), nn.BatchNorm(in_channels=8), nn.Activation('relu'),
            nn.Conv2D(8, 3, in_channels=8), nn.Activation('relu'), nn.Dense(4, in_units=32))
    mx.random.seed(1 + workers.rank)        # the store has to give all of them the net of the first
    net.initialize(mx.init.Xavier())
    gq.convert(net, 4, weight=METHODS[method], activation=method)
    gq.calibrate(net, [nd.array(data[0][0])])
    gq.freeze_batchnorm(net)
    for layer in layers(net).values():
        if layer.input_quantizer.follows:
            layer.input_quantizer.freeze()
    net.hybridize(static_alloc=True, static_shape=True)
    options = {'learning_rate': 0.05, 'momentum': 0.9, 'wd': 1e-4}
    other = nn.Dense(2, in_units=2)
    other.initialize()
    workers.trainer(other, 'sgd', options)  # has keys of the store, which must not be those of the next
    trainer = workers.trainer(net, 'sgd', options)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    size = 64 // workers.count
    for images, labels in data:
        mine = slice(workers.rank * size, (workers.rank + 1) * size)
        with autograd.record():
            loss = loss_function(net(nd.array(images[mine])), nd.array(labels[mine]))
        loss.backward()
        workers.step(trainer, net, size)
    nd.waitall()
    assert workers.total(workers.rank, 1) == [sum(range(workers.count)), workers.count]
    assert workers.same(7) and workers.same(workers.rank) == (workers.count == 1)
    np.savez(f'{path}.{workers.rank}.npz', **{name: parameter.data().asnumpy()
                                             for name, parameter in net._collect_params_with_prefix().items()})
    workers.leave()


if __name__ == '__main__':
    main(*sys.argv[1:])
