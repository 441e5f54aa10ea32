"""The three tiers on whole nets: the same numbers, in every process and instruction set."""
import os
import subprocess
import sys
from functools import partial

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant import ops
from tiers import running

pytestmark = pytest.mark.native
STATIC = {'static_alloc': True, 'static_shape': True}


def in_tier(tier, function, *args):
    with running(tier):
        return function(*args)


compiled = pytest.mark.parametrize('tier', ['portable', 'layout'])


class Residual(nn.HybridBlock):
    """Everything that the graph pass takes in, with channels that leave padding in oneDNN's blocks."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first = nn.HybridSequential()
            self.first.add(nn.Conv2D(channels, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation('relu'),
                           nn.Conv2D(channels, 3, padding=1, use_bias=False), nn.BatchNorm())

    def hybrid_forward(self, F, x):
        return F.Activation(self.first(x) + x, act_type='relu')


def small(channels, deferred=False):
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(channels, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'), nn.MaxPool2D(2, 2),
                Residual(channels), Residual(channels), nn.GlobalAvgPool2D(), nn.Dense(5))
    mx.random.seed(0)
    np.random.seed(0)
    net.initialize(init.Xavier())
    if not deferred:
        net(images(2))
    return net


def images(count, seed=1):
    return nd.array(np.random.RandomState(seed).uniform(-1, 1, (count, 3, 12, 10)))


def train(make, method, bits, steps, learning_rate):
    """Losses, and all Parameters after the last step."""
    net = make()
    x, label = images(16), nd.array(np.arange(16) % 5)
    gq.calibrate(gq.convert(net, bits=bits, method=method), [x])
    net.hybridize(**STATIC)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate, 'momentum': 0.9})
    loss_function, losses = gluon.loss.SoftmaxCrossEntropyLoss(), []
    for step in range(steps):
        half = slice(0, 8) if step % 2 else slice(8, 16)
        with autograd.record():
            loss = loss_function(net(x[half]), label[half]).mean()
        loss.backward()
        trainer.step(1)
        losses.append(loss.asscalar())
    nd.waitall()
    return np.array(losses), {name: p.data().asnumpy() for name, p in net.collect_params().items()}


def assert_tiers_agree(make, method, bits, steps, learning_rate):
    runs = {tier: in_tier(tier, train, make, method, bits, steps, learning_rate) for tier in ops.TIERS}
    losses, _ = runs['pure']
    assert losses[-1] < losses[0] - 0.05
    for tier in ('portable', 'layout'):
        # A range that differs in its last bit moves codes: that takes its time at this learning rate.
        np.testing.assert_allclose(runs[tier][0], losses, rtol=0, atol=1e-4)
        again = in_tier(tier, train, make, method, bits, steps, learning_rate)
        assert all(np.array_equal(value, again[1][name]) for name, value in runs[tier][1].items())


@pytest.mark.parametrize('channels', [16, 20])
@pytest.mark.parametrize('method, bits, learning_rate', [('int8', 8, 0.01), ('pact', 4, 1e-3), ('lsq', 4, 1e-3)])
def test_losses_agree_and_a_repeated_run_gives_equal_weights(channels, method, bits, learning_rate):
    assert_tiers_agree(partial(small, channels), method, bits, 25, learning_rate)


@pytest.mark.slow
@pytest.mark.parametrize('method, bits, learning_rate', [('int8', 8, 0.01), ('pact', 4, 1e-4), ('lsq', 4, 1e-4)])
def test_losses_of_two_hundred_steps_agree(method, bits, learning_rate):
    from gluoncv.model_zoo import get_model

    def make():
        net = get_model('cifar_resnet20_v1', classes=5, prefix='net_')
        mx.random.seed(0)
        np.random.seed(0)
        net.initialize(init.Xavier())
        net(images(2))
        return net
    assert_tiers_agree(make, method, bits, 200, learning_rate)


class Fan(nn.HybridBlock):
    """More quantizers on one tensor than MXNet adds gradients of without adding in place (8)."""

    def __init__(self, readers, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.readers = [gq.quantizers.create('pact', 4, 'activation') for _ in range(readers)]
            for number, reader in enumerate(self.readers):
                self.register_child(reader, str(number))

    def hybrid_forward(self, F, x):
        x = x * 1
        return sum((number + 1) * reader(x) for number, reader in enumerate(self.readers))


@compiled
@pytest.mark.parametrize('readers', [2, 7, 8, 12])
def test_a_tensor_that_many_quantizers_read_gets_all_their_gradients(tier, readers):
    def gradient():
        net = Fan(readers)
        net.initialize()
        for number, reader in enumerate(net.readers):
            reader.write(alpha=1 + number, initialized=1)
        net.hybridize(**STATIC)
        x = nd.array(np.linspace(-1, readers + 1, 99))
        x.attach_grad()
        with autograd.record():
            y = net(x)
        y.backward()
        return x.grad.asnumpy()
    assert np.array_equal(in_tier(tier, gradient), in_tier('pure', gradient))


@compiled
def test_a_net_that_is_hybridized_before_its_shapes_are_known_is_fused(tier):
    def hybridized():
        net = gq.convert(small(16, deferred=True), method='int8')
        net.hybridize(**STATIC)
        with autograd.record():
            net(images(2)).backward()
        return [node for node in net._cached_graph[1].get_internals().list_outputs() if 'gluonquant' in node], net
    nodes, net = in_tier(tier, hybridized)
    assert len({node.rpartition('_output')[0] for node in nodes}) == len(gq.layers.quantizers(net))


def python(code, *args, **environment):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@compiled
def test_an_exported_net_loads_in_a_process_that_imports_the_library(tier, tmp_path):
    def export():
        net = gq.convert(small(16), bits=4)
        gq.calibrate(net, [images(4)])
        net.hybridize()
        out = net(images(3)).asnumpy()
        net.export(str(tmp_path / 'net'))
        return out
    expected = in_tier(tier, export)
    np.save(tmp_path / 'x.npy', images(3).asnumpy())
    python('''
import sys, numpy as np, mxnet as mx
import gluonquant
folder = sys.argv[1]
net = mx.gluon.SymbolBlock.imports(f'{folder}/net-symbol.json', ['data'], f'{folder}/net-0000.params')
np.save(f'{folder}/y.npy', net(mx.nd.array(np.load(f'{folder}/x.npy'))).asnumpy())
''', tmp_path)
    assert np.array_equal(np.load(tmp_path / 'y.npy'), expected)


PASSES = '''
import sys, hashlib, numpy as np, mxnet as mx
from mxnet import autograd, nd
from gluonquant import quantizers
made = {}
for size in (1, 7, 8, 15, 16, 17, 63, 8191, 8192, 8193, 40000):
    values = np.random.RandomState(size).normal(size=size).astype('float32')
    for name in ('pact', 'int8', 'affine', 'fqn', 'lsq', 'lsqplus', 'qil', 'gdrq'):
        for role in ('activation', 'weight'):
            if role == 'weight' and name == 'pact':
                continue
            q = quantizers.create(name, 4, role, per_channel=False if role == 'weight' else None)
            q.initialize()
            x = nd.array(values)
            q.init_from(x)
            x.attach_grad()
            with autograd.record():
                y = q(x)
            y.backward(nd.array(np.cos(np.arange(size))))
            key = f'{name} {role} {size}'
            made[key], made[key + ' dx'] = y.asnumpy(), x.grad.asnumpy()
            for parameter in q.collect_params().values():
                if parameter.grad_req != 'null':
                    made[key + ' ' + parameter.name.rpartition('_')[2]] = parameter.grad().asnumpy()
np.savez(sys.argv[1], **made)
'''


@pytest.fixture(scope='module')
def passes(tmp_path_factory):
    """What every quantizer computes, with the instruction sets that run here and with one thread and two."""
    if ops.backend().tier == 'pure':
        pytest.skip(ops.backend().reason)
    folder, made = tmp_path_factory.mktemp('passes'), {}
    for isa, threads in (('avx512', 1), ('avx2', 1), ('baseline', 1), ('avx512', 2)):
        path = folder / f'{isa}{threads}.npz'
        python(PASSES, path, GLUONQUANT_ISA=isa, OMP_NUM_THREADS=str(threads))
        made[isa, threads] = dict(np.load(path))
    return made


@pytest.mark.parametrize('isa', ['avx2', 'baseline'])
def test_all_instruction_sets_compute_the_same(passes, isa):
    for key, value in passes['avx512', 1].items():
        # Elements are equal to the last bit; sums over them are added up in another order.
        np.testing.assert_allclose(passes[isa, 1][key], value, rtol=1e-5 if value.size == 1 else 0, atol=1e-6,
                                   err_msg=key)
        assert value.size == 1 or np.array_equal(passes[isa, 1][key], value), key


def test_two_threads_compute_what_one_does(passes):
    for key, value in passes['avx512', 1].items():
        assert np.array_equal(passes['avx512', 2][key], value), key
