"""Whole nets in every tier of operators: the same outputs, losses, gradients and files."""
import os
import subprocess
import sys
from functools import lru_cache

import mxnet as mx
import numpy as np
import pytest
from gluoncv.model_zoo import get_model as gluoncv_model
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn
from mxnet.gluon.model_zoo.vision import get_model as gluon_model
from operator_cases import COMPILED, STATIC, running

import gluonquant as gq
from gluonquant import ops
from gluonquant.fuse import fused

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings('ignore:Cannot decide type')]  # Gluon says so of any input

LOSS = gluon.loss.SoftmaxCrossEntropyLoss()


@pytest.fixture(params=COMPILED)
def tier(request):
    """A compiled tier; `running` switches to it."""
    with running(request.param):
        pass
    return request.param


@pytest.fixture(autouse=True)
def separate(monkeypatch):
    # The search for common subexpressions is slow, and merges reads of a Parameter around a write to it.
    monkeypatch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')


@init.register
class ByName(init.Initializer):
    """Weights that depend on their names alone, not on the order in which they become known."""

    def _init_weight(self, name, array):
        array[:] = np.random.default_rng(list(name.encode())).normal(0, 0.2, array.shape)


class Block(nn.HybridBlock):
    """conv - norm - relu - conv - norm, added to its input or to a convolution of it, relu."""

    def __init__(self, channels, inputs, norm=True, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first = nn.Conv2D(channels, 3, padding=1, use_bias=not norm)
            self.second = nn.Conv2D(channels, 3, padding=1, use_bias=not norm)
            self.shortcut = nn.Conv2D(channels, 1) if channels != inputs else None
            self.norms = nn.HybridSequential()
            self.norms.add(*((nn.BatchNorm() if norm else nn.Activation('tanh')) for _ in range(2)))

    def hybrid_forward(self, F, x):
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Blocks(nn.HybridBlock):
    """Residual blocks of widths that fill oneDNN's blocks of 16, of 8, and none; ReLU6, poolings, a depthwise layer."""

    def __init__(self, norm=True, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.stem = nn.Conv2D(16, 3, padding=1)
            self.one, self.two, self.three = (Block(16, 16, norm), Block(24, 16, norm), Block(20, 24, norm))
            self.depthwise = nn.Conv2D(20, 3, padding=1, groups=20)
            self.pool, self.average, self.output = nn.MaxPool2D(), nn.GlobalAvgPool2D(), nn.Dense(10)

    def hybrid_forward(self, F, x):
        x = self.two(self.pool(self.one(F.clip(self.stem(x), 0, 6))))
        return self.output(self.average(F.clip(self.depthwise(self.three(x)), 0, 6)))


NETS = {'blocks': (Blocks, 12), 'without norms': (lambda prefix: Blocks(norm=False, prefix=prefix), 12),
        'cifar_resnet20_v1': (lambda prefix: gluoncv_model('cifar_resnet20_v1', classes=10, prefix=prefix), 32),
        'mobilenetv2_0.25': (lambda prefix: gluon_model('mobilenetv2_0.25', classes=10, prefix=prefix), 32)}


def batch(name, seed=0, size=4):
    rng = np.random.default_rng(seed)
    shape = (size, 3, NETS[name][1], NETS[name][1])
    return nd.array(rng.uniform(-1, 1, shape)), nd.array(rng.integers(0, 10, size))


def float_net(name):
    """With the same weights every time, and BatchNorm statistics of the data."""
    mx.random.seed(7)
    np.random.seed(7)
    net = NETS[name][0](prefix='net_')
    net.initialize(init.Xavier())
    norms = [block for _, block in gq.layers.named_blocks(net) if isinstance(block, nn.BatchNorm)]
    for norm in norms:
        norm._kwargs['momentum'] = 0.0
    with autograd.record():
        out = net(batch(name)[0])
    out.backward()              # MXNet writes running statistics in the backward pass
    for norm in norms:
        norm._kwargs['momentum'] = 0.9
    return net


def converted(name, method='pact', hybridize=True, **options):
    """A calibrated net in the tier that runs; BatchNorm of the deep MobileNet, with maps of one pixel, is frozen."""
    net = gq.convert(float_net(name), method=method, **options)
    gq.calibrate(net, [batch(name)[0]])
    if name.startswith('mobilenet'):
        gq.freeze_batchnorm(net)
    if hybridize:
        net.hybridize(**STATIC)
    return net


def trainer(net, rate=0.01):
    options = {'learning_rate': rate, 'momentum': 0.9, 'wd': 1e-4}
    return gluon.Trainer(net.collect_params(), 'sgd', options, kvstore=None)


def step(net, optimizer, data, label):
    with autograd.record():
        loss = LOSS(net(data), label).mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step(1)
    return loss.asscalar()


def trained(net, name, steps, size=4):
    """Losses of training on three batches in turn."""
    optimizer = trainer(net)
    return [step(net, optimizer, *batch(name, number % 3, size)) for number in range(steps)]


def values(net):
    """All Parameters by name."""
    return {name: parameter._reduce().asnumpy() for name, parameter in net.collect_params().items()}


def gradients(net):
    return {name: parameter.grad().asnumpy() for name, parameter in net.collect_params().items()
            if parameter.grad_req != 'null'}


def assert_close(actual, expected, tolerance):
    """Within ``tolerance`` of the largest element; sums that cancel out are compared with the largest of all."""
    assert actual.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        bound = tolerance * max(np.abs(value).max(), 0.01 * largest)
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=bound, err_msg=name)


slow = pytest.mark.slow
SOME = [('blocks', 'pact'), ('blocks', 'gdrq'), ('cifar_resnet20_v1', 'lsq'), ('mobilenetv2_0.25', 'int8')]
ALL = [(net, method) for net in NETS for method in ('pact', 'lsq', 'int8', 'gdrq', 'qil', 'fqn', 'dorefa')]


def over(cases):
    return pytest.mark.parametrize('name, method', [
        pytest.param(*case, marks=() if case in cases else slow) for case in ALL])


# ---------------------------------------------------------------- inference and training


@over(SOME)
def test_inference_gives_the_outputs_of_the_plain_operators(tier, name, method):
    assert_same_outputs(inferred(tier, name, method), inferred('pure', name, method))


@lru_cache(maxsize=None)
def inferred(where, name, method):
    with running(where):
        return infer(converted(name, method), name)


def infer(net, name):
    return net(batch(name, 5)[0]).asnumpy()


def assert_same_outputs(actual, expected):
    # Equal, unless a convolution adds up in another order for an input in another layout.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# These learn no range, so all gradients of their quantizers are exact. Where sums in another order differ by a unit in
# the last place, a net of few bits goes its own way within a few steps.
EXACT = [('blocks', 'int8'), ('cifar_resnet20_v1', 'int8'),
         *(pytest.param(*case, marks=slow) for case in [('blocks', 'fqn'), ('mobilenetv2_0.25', 'int8')])]


@lru_cache(maxsize=None)
def losses(where, name, method, steps, size=4):
    with running(where):
        return trained(converted(name, method), name, steps, size)


@pytest.mark.parametrize('name, method', EXACT)
def test_thirty_steps_have_the_losses_of_the_plain_operators(tier, name, method):
    np.testing.assert_allclose(losses(tier, name, method, 30), losses('pure', name, method, 30), rtol=1e-4)


@slow
@pytest.mark.parametrize('method', ['int8', 'fqn'])
def test_two_hundred_steps_have_the_losses_of_the_plain_operators(tier, method):
    case = 'cifar_resnet20_v1', method, 200, 16
    np.testing.assert_allclose(losses(tier, *case), losses('pure', *case), rtol=1e-4)


def assert_same_steps(tier, name, method, steps, size=4):
    """Losses, gradients and states along the plain net's way: the other net gets its state before every step."""
    nets = []
    for where in ('pure', tier):
        with running(where):
            nets.append(converted(name, method))
            nets[-1](batch(name)[0])
    optimizer = trainer(nets[0])
    for number in range(steps):
        for parameter, other in zip(*(net.collect_params().values() for net in nets)):
            other.set_data(parameter._reduce())
        loss, other_loss = (step(net, None, *batch(name, number % 3, size)) for net in nets)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-4)
        assert_close(values(nets[1]), values(nets[0]), 1e-6)            # moving averages
        assert_close(gradients(nets[1]), gradients(nets[0]), 1e-4)      # sums in float32, through up to 50 layers
        optimizer.step(1)


@over([('blocks', 'lsq'), ('blocks', 'qil'), ('cifar_resnet20_v1', 'pact')])
def test_every_step_has_the_gradients_of_the_plain_operators(tier, name, method):
    assert_same_steps(tier, name, method, 8)


@slow
@pytest.mark.parametrize('method', ['pact', 'lsq', 'gdrq', 'qil', 'dorefa'])
def test_every_one_of_two_hundred_steps_has_the_gradients_of_the_plain_operators(tier, method):
    assert_same_steps(tier, 'cifar_resnet20_v1', method, 200, 16)


@pytest.mark.parametrize('where', ops.TIERS)
@pytest.mark.parametrize('name, method', [('blocks', 'lsq'), pytest.param('cifar_resnet20_v1', 'pact', marks=slow)])
def test_a_run_that_is_repeated_ends_in_the_same_weights(where, name, method):
    runs = []
    for _ in range(2):
        with running(where):
            net = converted(name, method)
            runs.append((trained(net, name, 30), values(net)))
    assert runs[0][0] == runs[1][0]
    for parameter, value in runs[0][1].items():
        np.testing.assert_array_equal(runs[1][1][parameter], value, err_msg=parameter)


# ---------------------------------------------------------------- what users do between the steps


def told(tier, method, story, **options):
    """What a story says about a net in the plain tier and in another; stories yield numbers or arrays."""
    for where in ('pure', tier):
        with running(where):
            yield [np.asarray(value) for value in story(converted('blocks', method, **options))]


def assert_same_story(tier, method, story, **options):
    expected, actual = told(tier, method, story, **options)
    assert len(actual) == len(expected) > 0
    for place, (value, other) in enumerate(zip(expected, actual)):
        bound = 1e-4 * np.abs(value).max()      # a few steps in float32
        np.testing.assert_allclose(other, value, rtol=0, atol=bound, err_msg=f'part {place} of the story')


def switching(net):
    """Frozen, unfrozen, observed, switched off and on again, without hybridizing again."""
    optimizer = trainer(net, 1e-3)
    for switch in (lambda: None, lambda: gq.freeze(net), lambda: gq.unfreeze(net), lambda: gq.set_mode(net, 'off'),
                   lambda: gq.set_mode(net, 'observe'), lambda: gq.set_mode(net, 'quantize'),
                   lambda: gq.set_phase(net, False), lambda: gq.set_phase(net, True)):
        switch()
        yield infer(net, 'blocks')
        for seed in range(2):
            yield step(net, optimizer, *batch('blocks', seed))


@pytest.mark.parametrize('method', ['int8', 'gdrq', 'pact', 'lsq'])
def test_switches_in_the_middle_of_training_do_the_same(tier, method):
    assert_same_story(tier, method, switching, bits=8)


def test_switches_of_a_hybridized_net_do_what_they_do_imperatively(tier):
    with running(tier):
        hybridized, imperative = ([np.asarray(value) for value in switching(converted('blocks', 'pact', hybridize))]
                                  for hybridize in (True, False))
    for value, other in zip(imperative, hybridized):
        # A pooling is a mean when hybridized, which moves last bits.
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-4 * np.abs(value).max())


def alternating(net):
    """Inference between training steps, and batches of several sizes."""
    optimizer = trainer(net, 1e-3)
    for seed, size in [(0, 4), (1, 2), (2, 7), (3, 1), (4, 4)]:
        yield net(batch('blocks', seed + 5, size)[0]).asnumpy()
        yield step(net, optimizer, *batch('blocks', seed, size + 1))
        yield net(batch('blocks', seed + 9, size + 2)[0]).asnumpy()


@pytest.mark.parametrize('how', [{}, {'static_alloc': True}], ids=str)
def test_one_hybridized_net_takes_batches_of_any_size_in_training_and_inference(tier, how):
    def story(net):
        net.hybridize(**how)
        return alternating(net)
    assert_same_story(tier, 'pact', story, bits=8)


def test_gradients_of_two_half_batches_add_up_to_those_of_the_whole(tier):
    with running(tier):
        net = converted('without norms', 'lsq', first_last_bits=None)
        whole, found = batch('without norms', size=8), []
        for request, parts in (('write', [slice(0, 8)]), ('add', [slice(0, 4), slice(4, 8)])):
            for parameter in net.collect_params().values():
                if parameter.grad_req != 'null':
                    parameter.grad_req = request
            net.collect_params().zero_grad()
            for part in parts:
                with autograd.record():
                    loss = LOSS(net(whole[0][part]), whole[1][part]).sum()
                loss.backward()
            found.append(gradients(net))
    assert_close(found[1], found[0], 1e-5)      # float32, added up in another order


def uncalibrated(where, hybridize):
    with running(where):
        net = gq.convert(Blocks(prefix='net_'), method='int8', bits=8)
        net.initialize(ByName())
        if hybridize:
            net.hybridize(**STATIC)
        return trained(net, 'blocks', 3)


def test_a_net_that_is_hybridized_before_its_shapes_are_known_trains_the_same(tier):
    # Three steps in float32; the plain net is not hybridized and pools in another order.
    np.testing.assert_allclose(uncalibrated(tier, True), uncalibrated('pure', False), rtol=1e-4)


def test_a_net_cast_to_half_precision_and_back_computes_the_same(tier):
    def story(net):
        net.cast('float16')         # MXNet has no convolutions in it for processors
        net.cast('float32')
        yield infer(net, 'blocks')
    assert_same_story(tier, 'pact', story)


class Joined(nn.HybridBlock):
    """A quantizer behind a sum and a ReLU."""

    def __init__(self):
        super().__init__()
        self.quantizer = gq.quantizers.create('pact', 4, 'activation')

    def hybrid_forward(self, F, a, b):
        return self.quantizer(F.relu(a + b))


def test_in_half_precision_a_quantizer_gives_the_outputs_and_gradients_of_the_plain_operators(tier):
    results = []
    for where in ('pure', tier):
        with running(where):
            net = Joined()
            net.initialize()
            net.quantizer.write(alpha=0.9, initialized=1)
            net.cast('float16')
            net.hybridize(**STATIC)
            inputs = [nd.array(np.random.default_rng(seed).normal(size=(3, 4, 5)), dtype='float16') for seed in (1, 2)]
            for x in inputs:
                x.attach_grad()
            with autograd.record():
                y = net(*inputs)
            y.backward()
            results.append([array.asnumpy() for array in (y, *(x.grad for x in inputs), net.quantizer.alpha.grad())])
    for expected, actual in zip(*results):
        np.testing.assert_array_equal(actual, expected)     # the gradient of alpha is a sum of ones


def in_two_contexts(where):
    """Losses and gradients of one batch in either context."""
    contexts = [mx.cpu(0), mx.cpu(1)]
    with running(where):
        net = Blocks(prefix='net_')
        net.initialize(ByName(), ctx=contexts)
        gq.calibrate(gq.convert(net, method='pact'), [batch('blocks')[0]])
        net.hybridize(**STATIC)
        parts = [[array.as_in_context(context) for array in batch('blocks', place)]
                 for place, context in enumerate(contexts)]
        with autograd.record():
            losses = [LOSS(net(data), label).mean() for data, label in parts]
        autograd.backward(losses)
        return {f'{name} {place}': array.asnumpy() for place, context in enumerate(contexts)
                for name, array in [('loss', losses[place]), *((p.name, p.grad(context))
                                    for p in net.collect_params().values() if p.grad_req != 'null')]}


def test_a_net_in_two_contexts_has_the_gradients_of_the_plain_operators(tier):
    assert_close(in_two_contexts(tier), in_two_contexts('pure'), 1e-4)      # 20 layers of float32


# ---------------------------------------------------------------- files and other graphs


@pytest.mark.parametrize('written, read', [('pure', 'layout'), ('layout', 'portable'), ('portable', 'pure')])
def test_what_one_tier_saves_another_loads(tmp_path, written, read):
    with running(written):
        net = converted('blocks', 'pact')
        trained(net, 'blocks', 2)
        gq.save(net, str(tmp_path / 'net.npz'))
        expected = infer(net, 'blocks')
    with running(read):
        loaded = gq.load(str(tmp_path / 'net.npz'), Blocks(prefix='other_'))
        loaded.hybridize(**STATIC)
        assert_same_outputs(infer(loaded, 'blocks'), expected)


IMPORT = """
import sys
import gluonquant
import numpy as np
from mxnet import gluon, nd
block = gluon.SymbolBlock.imports(sys.argv[1] + '-symbol.json', ['data'], sys.argv[1] + '-0000.params')
np.save(sys.argv[1] + '-out.npy', block(nd.array(np.load(sys.argv[1] + '.npy'))).asnumpy())"""


def test_an_exported_net_runs_in_a_new_process_that_only_imports_gluonquant(tier, tmp_path):
    path = str(tmp_path / 'net')
    with running(tier):
        net = converted('blocks', 'pact')
        trained(net, 'blocks', 2)
        expected = infer(net, 'blocks')
        net.export(path)
    np.save(path + '.npy', batch('blocks', 5)[0].asnumpy())
    subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORT, path], check=True, timeout=120,
                   env={**os.environ, 'GLUONQUANT_OPS': tier})
    np.testing.assert_array_equal(np.load(path + '-out.npy'), expected)


def test_what_the_layout_tier_exports_the_portable_one_imports(tmp_path):
    path = str(tmp_path / 'net')
    with running('layout'):
        net = converted('blocks', 'pact')
        expected = infer(net, 'blocks')
        net.export(path)
    np.save(path + '.npy', batch('blocks', 5)[0].asnumpy())
    subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORT, path], check=True, timeout=120,
                   env={**os.environ, 'GLUONQUANT_OPS': 'portable'})
    assert_same_outputs(np.load(path + '-out.npy'), expected)


@pytest.mark.parametrize('name', ['blocks', pytest.param('cifar_resnet20_v1', marks=slow)])
def test_switched_off_a_net_is_the_float_net(tier, name):
    plain = float_net(name)
    # With the pooling of converted nets, which is a mean and moves last bits.
    expected = gluon.SymbolBlock(fused(plain(mx.sym.var('data'))), mx.sym.var('data'), plain.collect_params())
    expected.hybridize()
    with running(tier):
        net = gq.set_mode(converted(name, 'pact'), 'off')
        np.testing.assert_array_equal(infer(net, name), infer(expected, name))


def executed(where, method, request):
    """Outputs, gradients and states of two passes of an executor bound to the fused graph."""
    with running(where):
        net = converted('blocks', method, hybridize=False)
        parameters = net.collect_params()
        for parameter in parameters.values():
            parameter._var = None       # the variable of a Parameter whose shape was not known
        symbol, (data, _) = fused(net(mx.sym.var('data'))), batch('blocks')
        requests = {name: request if name == 'data' or parameters[name].grad_req != 'null' else 'null'
                    for name in symbol.list_arguments()}
        executor = symbol.simple_bind(mx.cpu(), grad_req=requests, data=data.shape)
        executor.copy_params_from({name: p.data() for name, p in parameters.items() if name in executor.arg_dict},
                                  {name: p.data() for name, p in parameters.items() if name in executor.aux_dict})
        executor.arg_dict['data'][:] = data
        for _ in range(2):
            out, = executor.forward(is_train=True)
            executor.backward([nd.ones_like(out)])
        return {'output': out.asnumpy(), **{name: grad.asnumpy() for name, grad in executor.grad_dict.items()
                                            if grad is not None}}


@pytest.mark.parametrize('request_', ['write', 'add'])
@pytest.mark.parametrize('method', ['pact', 'int8'])
def test_an_executor_computes_the_same(tier, method, request_):
    assert_close(executed(tier, method, request_), executed('pure', method, request_), 1e-4)    # 20 layers of float32
