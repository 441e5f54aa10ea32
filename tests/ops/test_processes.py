"""The compiled operators in several threads and processes."""
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn
from operator_cases import COMPILED, STATIC, WAYS, activation, running

import gluonquant as gq
from gluonquant import ops

pytestmark = pytest.mark.native


@pytest.fixture(params=COMPILED)
def tier(request):
    """Runs on the operators of this tier."""
    with running(request.param):
        yield request.param


def data(seed):
    return nd.array(np.random.default_rng(seed).normal(size=(4, 3, 16, 16)))


def converted(seed, method, way='static'):
    """A net of its own for every seed, with enough elements for several threads."""
    net = nn.HybridSequential()
    net.add(*(nn.Conv2D(32, 3, padding=1, activation='relu', in_channels=channels) for channels in (3, 32, 32)),
            nn.GlobalAvgPool2D(), nn.Dense(5, in_units=32))
    net.initialize()
    rng = np.random.default_rng(seed)
    for parameter in net.collect_params().values():
        parameter.set_data(nd.array(rng.normal(0, 0.1, parameter.shape)))
    gq.calibrate(gq.convert(net, method=method), [data(seed)])
    if WAYS[way] is not None:
        net.hybridize(**WAYS[way])
    return net


def train(net, seed, results):
    """Put losses and a last output under ``seed``."""
    optimizer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.01}, kvstore=None)
    losses = []
    for step in range(10):
        with autograd.record():
            loss = (net(data(seed + step)) ** 2).sum()
        loss.backward()
        optimizer.step(1)
        losses.append(loss.asscalar())
    results[seed] = [*losses, *net(data(seed)).asnumpy().reshape(-1)]


def infer(net, seed, results):
    """Put outputs of many passes under ``seed``."""
    results[seed] = np.concatenate([net(data(seed + step)).asnumpy() for step in range(20)])


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('work', [(train, train), (train, infer), (infer, infer)], ids=['train', 'both', 'infer'])
def test_two_threads_with_nets_of_their_own_compute_what_one_after_the_other_computes(tier, way, work):
    alone, together = {}, {}
    nets = {seed: converted(seed, method, way) for seed, method in [(1, 'pact'), (100, 'lsq')]}
    for (seed, net), task in zip(nets.items(), work):
        task(net, seed, alone)
    nets = {seed: converted(seed, method, way) for seed, method in [(1, 'pact'), (100, 'lsq')]}
    threads = [threading.Thread(target=task, args=(net, seed, together))
               for (seed, net), task in zip(nets.items(), work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in alone.items():
        np.testing.assert_array_equal(together[seed], expected)


class Quantized(gluon.data.Dataset):
    """Images that are quantized where they are read: in the workers of a DataLoader."""

    def __init__(self):
        self.quantizers = [activation(name) for name in ('pact signed', 'int8', 'lsq', 'affine')]
        for quantizer in self.quantizers[1:]:
            quantizer.hybridize(**STATIC)

    def __len__(self):
        return 8

    def __getitem__(self, place):
        x = nd.array(np.random.default_rng(place).normal(size=(3, 64, 256)))        # several blocks, several threads
        return nd.stack(*(quantizer(x) for quantizer in self.quantizers))


def test_workers_of_a_data_loader_quantize_as_the_parent_does(tier):
    dataset = Quantized()
    expected = [dataset[place].asnumpy() for place in range(len(dataset))]      # several threads run before the fork
    loader = gluon.data.DataLoader(dataset, batch_size=4, num_workers=2, timeout=60)
    np.testing.assert_array_equal(np.concatenate([batch.asnumpy() for batch in loader]), expected)


def test_the_parent_trains_as_before_while_workers_quantize(tier):
    alone, together = {}, {}
    train(converted(1, 'pact'), 1, alone)
    net, loader = converted(1, 'pact'), gluon.data.DataLoader(Quantized(), batch_size=1, num_workers=2, timeout=60)
    batches = iter(loader)
    next(batches)
    train(net, 1, together)
    assert sum(len(batch) for batch in batches) == 7
    np.testing.assert_array_equal(together[1], alone[1])


BACKEND = '''
import mxnet as mx
import gluonquant as gq
print(gq.ops.backend().tier, gq.ops.name('activation'), hasattr(mx.nd._internal, '_gluonquant_activation'))'''


@pytest.mark.parametrize('value, expected', [
    ('pure', 'pure None False'), ('layout', 'layout _gluonquant_blocked_activation True')])
def test_the_environment_variable_decides_what_an_import_loads(value, expected):
    with running(value):        # or skip
        done = subprocess.run([sys.executable, '-c', BACKEND], env={**os.environ, 'GLUONQUANT_OPS': value},
                              capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, '')


def test_an_empty_environment_variable_means_the_fastest_tier(monkeypatch):
    before = ops.backend()
    try:
        monkeypatch.setenv('GLUONQUANT_OPS', '')
        ops._start()
        chosen = ops.backend().tier
        ops.use('auto')
        assert chosen == ops.backend().tier
    finally:
        ops.use(before.tier)
