"""`convert`: what it decides for every layer, and that it changes all of a net or nothing."""
import warnings

import mxnet as mx
import numpy as np
import pytest
from gluoncv.model_zoo import get_model
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import gluonquant as gq
from gluonquant.layers import layers, named_blocks, quantizers
from gluonquant.plan import PRESETS
from tiers import running

ROUNDING = '"scalar": "12582912.0"'       # 1.5 * 2**23, which rounding adds and subtracts
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


def small(ran=True):
    """Conv, Conv behind a ReLU, depthwise Conv behind no ReLU, Dense."""
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Conv2D(6, 3, use_bias=False), nn.BatchNorm(),
                nn.Conv2D(6, 3, groups=6), nn.Activation('relu'), nn.Dense(3))
    net.initialize(init.Xavier())
    if ran:
        net(images())
    return net


def images(seed=0, count=2, size=8):
    return nd.array(np.random.default_rng(seed).uniform(-1, 1, (count, 3, size, size)))


def spec(net, path, role='weight'):
    return getattr(layers(net)[path].config, role)


def train_step(net, x):
    with autograd.record():
        out = net(x)
    out.backward()


class Snapshot:
    """What a net is, to compare with later."""

    def __init__(self, net, x=None):
        self.net, self.x = net, images() if x is None else x
        self.before = self.now()
        self.output = net(self.x).asnumpy()

    def now(self):
        return ([(path, block, type(block), sorted(block._children)) for path, block in named_blocks(self.net)],
                list(self.net.collect_params().items()))

    def check(self):
        assert self.now() == self.before
        np.testing.assert_array_equal(self.net(self.x).asnumpy(), self.output)


@pytest.fixture
def net(seed):
    return small()


# ---------------------------------------------------------------- what stays


def test_it_works_in_place_and_returns_the_net(net):
    conv = net[0]
    assert gq.convert(net) is net and net[0] is conv


def test_the_float_parameters_are_the_same_objects_under_the_same_names(net):
    before, structural = dict(net.collect_params()), dict(net._collect_params_with_prefix())
    gq.convert(net)
    after, after_structural = net.collect_params(), net._collect_params_with_prefix()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(after_structural[name] is parameter for name, parameter in structural.items())


def test_every_new_parameter_belongs_to_a_quantizer(net):
    before = set(net.collect_params())
    new = set(gq.convert(net).collect_params()) - before
    assert new and all('_quantizer_' in name for name in new)


def test_a_float_checkpoint_loads_after_conversion(net, tmp_path):
    net.save_parameters(str(tmp_path / 'float'))
    expected = net(images()).asnumpy()
    other = gq.convert(small(ran=False))
    other.load_parameters(str(tmp_path / 'float'), allow_missing=True)
    gq.set_mode(other, 'off')
    np.testing.assert_array_equal(other(images()).asnumpy(), expected)


def test_hooks_of_a_layer_survive(net):
    calls = []
    net[2].register_forward_hook(lambda *args: calls.append(1))
    gq.convert(net, weight='none', activation='none')
    calls.clear()
    net(images())
    assert calls == [1]


def test_a_net_that_was_hybridized_but_not_run_converts(seed):
    net = small(ran=False)
    net.hybridize()
    gq.calibrate(gq.convert(net), [images()])
    hybridized = net(images()).asnumpy()
    net.hybridize(False)
    np.testing.assert_array_equal(net(images()).asnumpy(), hybridized)


def test_a_single_layer_is_a_net(seed):
    net = gq.convert(nn.Dense(3), method='int8')
    assert list(layers(net)) == [''] and type(net).__name__ == 'QDense'


def test_a_block_that_stands_in_two_places_is_converted_once(seed):
    dense = nn.Dense(4, in_units=4)
    net = nn.HybridSequential()
    net.add(dense, nn.Activation('relu'), dense)
    net.initialize()
    assert list(layers(gq.convert(net))) == ['0']


# ---------------------------------------------------------------- methods


def test_the_default_is_lsq_with_4_bits_per_channel(net):
    gq.convert(net)
    assert spec(net, '2').method == spec(net, '2', 'activation').method == 'lsq'
    assert spec(net, '2').bits == spec(net, '2', 'activation').bits == 4 and spec(net, '2').per_channel


@pytest.mark.parametrize('method', PRESETS)
def test_a_preset_names_the_methods_of_both_roles(net, method):
    gq.convert(net, method=method)
    assert (spec(net, '2').method, spec(net, '2', 'activation').method) == PRESETS[method]


@pytest.mark.parametrize('method', PRESETS)
@hybridized_or_not
def test_every_preset_calibrates_and_trains(net, method, hybridized):
    gq.calibrate(gq.convert(net, method=method), [images()])
    net.hybridize(hybridized)
    train_step(net, images(1))
    gradients = [p.grad().asnumpy() for p in net.collect_params('.*weight$').values()]
    assert len(gradients) == 4 and all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients)


@pytest.mark.parametrize('weight', ['gdrq', 'int8', 'sawb', 'lsqplus', 'affine'])
def test_methods_of_the_roles_mix(net, weight):
    gq.convert(net, weight=weight, activation='pact')
    assert (spec(net, '2').method, spec(net, '2', 'activation').method) == (weight, 'pact')


def test_a_role_overrides_the_preset(net):
    gq.convert(net, method='qil', activation='gdrq')
    assert (spec(net, '2').method, spec(net, '2', 'activation').method) == ('qil', 'gdrq')


def test_none_leaves_a_role_float(net):
    x, weight = nd.array([[-0.3, 7.1]]), net[2].weight.data()
    gq.convert(net, weight='none', activation='none')
    assert spec(net, '0').method == spec(net, '6', 'activation').method == 'none'
    for got, expected in ((net[2].input_quantizer(x), x), (net[2].weight_quantizer(weight), weight)):
        np.testing.assert_array_equal(got.asnumpy(), expected.asnumpy())


def test_bits_of_the_roles_override_bits(net):
    gq.convert(net, bits=4, weight_bits=2, activation_bits=3)
    assert (spec(net, '2').bits, spec(net, '2', 'activation').bits) == (2, 3)
    assert net[2].weight_quantizer.grid.bits == 2 and net[2].input_quantizer.grid.bits == 3


@pytest.mark.parametrize('per_channel, scales', [(True, 6), (False, 1)])
def test_per_channel_decides_how_many_weight_scales_there_are(net, per_channel, scales):
    gq.convert(net, method='int8', per_channel=per_channel)
    assert net[2].weight_quantizer.qparams().scale.shape == (scales,)


def test_options_reach_the_quantizers(net):
    gq.convert(net, method='gdrq', weight_options={'ktimes': 2.5}, activation_options={'lam': 0.25})
    assert net[2].weight_quantizer.ktimes == 2.5 and net[2].input_quantizer.decay == 0.75


def test_options_add_to_those_for_pretrained_nets(net):
    gq.convert(net, method='gdrq', activation_options={'lam': 0.25})
    assert spec(net, '2', 'activation').options == {'ktimes': 12.0, 'lam': 0.25}


@pytest.mark.parametrize('bits, weight, activation', [(2, 2.5, 8), (3, 3.5, 10), (4, 4, 12), (8, 4, 12)])
def test_gdrq_starts_from_thresholds_that_suit_the_bits(net, bits, weight, activation):
    gq.convert(net, bits, method='gdrq')
    assert (net[2].weight_quantizer.ktimes, net[2].input_quantizer.ktimes) == (weight, activation)
    assert net[2].weight_quantizer.group_size == 1


def test_dorefa_weights_keep_their_size(net):
    gq.convert(net, method='dorefa')
    assert net[2].weight_quantizer.rescale == 'max'


def test_gradient_bits_reach_every_layer(net):
    gq.convert(net, gradient_bits=6)
    assert [layer.config.gradient_bits for layer in layers(net).values()] == [6] * 4


# ---------------------------------------------------------------- first and last layer


@pytest.mark.parametrize('first_last_bits', [8, 6])
def test_first_layer_and_last_dense_are_int8_with_their_own_bits(net, first_last_bits):
    gq.convert(net, bits=3, first_last_bits=first_last_bits)
    for path in ('0', '6'):
        for role in ('weight', 'activation'):
            assert (spec(net, path, role).method, spec(net, path, role).bits) == ('int8', first_last_bits)
    assert spec(net, '2').bits == spec(net, '4').bits == 3


def test_first_last_bits_none_leaves_them_float(net):
    gq.convert(net, first_last_bits=None)
    assert list(layers(net)) == ['2', '4'] and type(net[0]) is nn.Conv2D and type(net[6]) is nn.Dense


def test_first_and_last_stay_fqn(net):
    gq.convert(net, method='fqn')
    assert {spec(net, path, role).method for path in ('0', '6') for role in ('weight', 'activation')} == {'fqn'}


def test_the_last_layer_of_a_net_without_dense_is_its_last_convolution(seed):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.Conv2D(5, 3), nn.Conv2D(6, 3))
    gq.convert(net)
    assert [spec(net, path).method for path in '012'] == ['int8', 'lsq', 'int8']


class Unordered(nn.HybridBlock):
    """Registers its layers in another order than it uses them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.last, self.middle, self.first = nn.Dense(4), nn.Dense(4), nn.Dense(4)

    def hybrid_forward(self, F, x):
        return self.last(self.middle(self.first(x)))


def test_first_and_last_are_found_by_use_not_by_registration(seed):
    net = gq.convert(Unordered())
    assert [spec(net, path).method for path in ('first', 'middle', 'last')] == ['int8', 'lsq', 'int8']


def test_a_layer_outside_the_traced_graph_is_not_the_last(seed):
    net = Unordered()
    with net.name_scope():
        net.auxiliary = nn.Dense(4)
    gq.convert(net)
    assert [spec(net, path).method for path in ('first', 'last', 'auxiliary')] == ['int8', 'int8', 'lsq']


# ---------------------------------------------------------------- exclude and rules


def test_excluded_layers_stay_float(net):
    gq.convert(net, exclude=['2', '6'])
    assert list(layers(net)) == ['0', '4'] and type(net[2]) is nn.Conv2D


def test_a_pattern_covers_all_below_a_block(seed):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), small(), small(), nn.Dense(2))
    gq.convert(net, exclude=['1'])
    assert not [path for path in layers(net) if path.startswith('1')] and '2.0' in layers(net)


@pytest.mark.parametrize('kind', [gq.Rule, dict])
def test_a_rule_changes_the_layers_it_matches(net, kind):
    gq.convert(net, rules=[kind(pattern='[24]', bits=2, activation='pact')])
    assert [spec(net, path).bits for path in '0246'] == [8, 2, 2, 8]
    assert [spec(net, path, 'activation').method for path in '0246'] == ['int8', 'pact', 'pact', 'int8']


def test_later_rules_win_and_keep_what_they_do_not_name(net):
    gq.convert(net, rules=[{'pattern': '*', 'weight_bits': 5, 'activation_bits': 6},
                           {'pattern': '2', 'weight_bits': 3}])
    assert (spec(net, '2').bits, spec(net, '2', 'activation').bits) == (3, 6)
    assert (spec(net, '4').bits, spec(net, '4', 'activation').bits) == (5, 6)


def test_rules_win_over_first_and_last(net):
    gq.convert(net, rules=[{'pattern': '0', 'bits': 5, 'weight': 'sawb'}])
    assert (spec(net, '0').method, spec(net, '0').bits) == ('sawb', 5)


def test_options_of_a_rule_add_unless_the_method_changes(net):
    gq.convert(net, method='gdrq', rules=[{'pattern': '2', 'activation_options': {'lam': 0.5}},
                                          {'pattern': '4', 'activation': 'pact'}])
    assert spec(net, '2', 'activation').options == {'ktimes': 12.0, 'lam': 0.5}
    assert spec(net, '4', 'activation').options == {}


@pytest.mark.parametrize('weight', ['dorefa', 'qil', 'sawb', 'gdrq'])
def test_a_rule_with_another_method_equals_convert_with_that_method(net, weight):
    gq.convert(net, rules=[{'pattern': '[24]', 'weight': weight}])
    other = gq.convert(small(), weight=weight)
    assert spec(net, '2') == spec(other, '2') and spec(net, '4') == spec(other, '4')


# ---------------------------------------------------------------- signs


def test_inputs_behind_a_relu_are_unsigned_and_others_signed(net):
    gq.convert(net)
    assert [spec(net, path, 'activation').signed for path in '0246'] == [True, False, True, False]
    assert [net[int(path)].input_quantizer.grid.signed for path in '0246'] == [True, False, True, False]


def test_signed_true_forces_signed_grids(net):
    gq.convert(net, signed=True)
    assert all(q.grid.signed for q in quantizers(net, 'activation').values())


def test_linear_bottlenecks_of_mobilenetv2_are_signed(seed):
    net = gq.convert(vision.mobilenet_v2_0_25(classes=4))
    signed = {path: layer.config.activation.signed for path, layer in layers(net).items()}
    expand = [path for path in signed if path.endswith('out.0') and path != 'features.3.out.0']
    assert len(expand) > 10 and all(signed[path] for path in expand)
    assert not any(signed[path] for path in signed if path.endswith(('out.3', 'out.6')))


@pytest.mark.parametrize('method', ['qil', 'dorefa'])
def test_methods_for_relu_outputs_fall_back_to_int8_on_signed_inputs(net, method):
    gq.convert(net, method=method)
    assert [spec(net, path, 'activation').method for path in '24'] == [method, 'int8']
    assert spec(net, '4', 'activation').bits == 4


@pytest.mark.parametrize('method', ['qil', 'dorefa'])
def test_methods_for_relu_outputs_refuse_forced_signs(net, method):
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"layer '2' \(Conv2D 4 -> 6\): signed=True: .*exclude=\['2'\]"):
        gq.convert(net, method=method, signed=True)
    before.check()


# ---------------------------------------------------------------- nets that cannot be traced


class UsesShape(nn.HybridBlock):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.conv, self.relu, self.output = nn.Conv2D(4, 3), nn.Activation('relu'), nn.Dense(3)

    def hybrid_forward(self, F, x):
        x = self.relu(self.conv(x))
        return self.output(x.reshape((x.shape[0], -1)))


class Imperative(gluon.Block):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.conv, self.output = nn.Conv2D(4, 3), nn.Dense(3)

    def forward(self, x):
        return self.output(nd.relu(self.conv(x)))


@pytest.mark.parametrize('kind', [UsesShape, Imperative])
def test_a_net_that_cannot_be_traced_converts_with_signed_inputs(seed, kind):
    net = kind()
    net.initialize()
    gq.calibrate(gq.convert(net), [images()])
    assert [spec(net, path, 'activation').signed for path in ('conv', 'output')] == [True, True]
    train_step(net, images())
    assert np.abs(net.conv.weight.grad().asnumpy()).max() > 0


# ---------------------------------------------------------------- shared inputs


def residual(name='cifar'):
    net = get_model('cifar_resnet20_v1', classes=4) if name == 'cifar' else vision.resnet18_v1(classes=4)
    net.initialize(init.Xavier())
    return net


PAIRS = {'cifar': ['features.3.0', 'features.4.0'], 'imagenet': ['features.5.0', 'features.6.0', 'features.7.0']}


@pytest.mark.parametrize('name', PAIRS)
def test_the_two_branches_of_a_block_share_one_input_quantizer(name):
    converted = layers(gq.convert(residual(name)))
    sharing = [path for path, layer in converted.items() if layer.config.shares_input_with]
    assert sharing == [f'{path}.body.0' for path in PAIRS[name]]
    for path in PAIRS[name]:
        assert converted[f'{path}.body.0'].input_quantizer is converted[f'{path}.downsample.0'].input_quantizer


@pytest.mark.parametrize('name', PAIRS)
def test_a_shared_quantizer_stands_once_in_the_graph(name):
    with running('pure'):
        net = gq.convert(residual(name), method='int8')
        symbol = net(mx.sym.var('data')).tojson()
    assert symbol.count(ROUNDING) == 2 * len(quantizers(net))


class Branches(nn.HybridBlock):
    """Two layers that read the same tensor; the second branch may fail."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.broken = False
        with self.name_scope():
            self.a, self.b = nn.Dense(3, in_units=4), nn.Dense(3, in_units=4)

    def hybrid_forward(self, F, x):
        out = self.a(x)
        if self.broken:
            raise KeyError('broken')
        return out + self.b(x)


def branches(**kwargs):
    net = Branches()
    net.initialize(init.Xavier())
    gq.convert(net, method='int8', first_last_bits=4, activation_options={'ema_decay': 0.5}, **kwargs)
    return net, net.a.input_quantizer


def test_layers_with_other_input_settings_do_not_share():
    net, _ = branches(rules=[{'pattern': 'b', 'activation_bits': 5}])
    assert net.a.input_quantizer is not net.b.input_quantizer


def test_layers_with_other_weight_settings_share():
    net, _ = branches(rules=[{'pattern': 'b', 'weight_bits': 5}])
    assert net.a.input_quantizer is net.b.input_quantizer and net.b.config.shares_input_with == 'a'


@hybridized_or_not
def test_a_shared_average_advances_once_per_step(hybridized):
    net, q = branches()
    net.hybridize(hybridized)
    for amax in (1, 2, 4):
        train_step(net, nd.full((2, 4), amax))
    assert q.value('amax') == 0.5 * (0.5 * (1 + 2)) + 0.5 * 4


def test_a_shared_average_advances_once_after_an_exception():
    net, q = branches()
    train_step(net, nd.full((2, 4), 1))
    net.broken = True
    with pytest.raises(KeyError):
        net(nd.full((2, 4), 1))
    net.broken = False
    train_step(net, nd.full((2, 4), 3))
    assert q.value('amax') == 2


def test_an_array_that_changed_in_place_after_an_exception_is_quantized_anew():
    net, q = branches()
    x = nd.full((2, 4), 4)
    train_step(net, x)
    net.broken = True
    with pytest.raises(KeyError):
        net(x)
    net.broken = False
    x[:] = 2
    np.testing.assert_array_equal(net(x).asnumpy(), net(x.copy()).asnumpy())


def test_a_training_pass_after_a_failed_inference_pass_moves_the_shared_average():
    net, q = branches()
    x = nd.full((2, 4), 4)
    net.broken = True
    with pytest.raises(KeyError), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net(x)
    net.broken = False
    train_step(net, x)
    assert q.value('amax') == 4


@pytest.mark.parametrize('way', ['ours', 'gluon'])
def test_a_shared_average_advances_once_after_loading(tmp_path, way):
    net, q = branches()
    train_step(net, nd.full((2, 4), 1))
    path = str(tmp_path / 'net')
    other, q = branches() if way == 'gluon' else (Branches(), None)
    if way == 'ours':
        gq.save(net, path)
        gq.load(path, other)
    else:
        net.save_parameters(path)
        other.load_parameters(path)
    assert other.a.input_quantizer is other.b.input_quantizer
    train_step(other, nd.full((2, 4), 3))
    assert other.a.input_quantizer.value('amax') == 2


def averages_once_per_step(net, hybridized):
    """Convert ``net`` (layers a and b reading its input), train on amax 1, then 3, and expect their average."""
    net.initialize()
    gq.convert(net, method='int8', first_last_bits=4, activation_options={'ema_decay': 0.5})
    net.hybridize(hybridized)
    for amax in (1, 3):
        train_step(net, nd.full((2, 4), amax))
    assert net.a.input_quantizer.value('amax') == 2


class TwoParts(gluon.Block):
    """Two branches that are hybridized each for itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.a, self.b = nn.Dense(3, in_units=4), nn.Dense(3, in_units=4)

    def forward(self, x):
        return self.a(x) + self.b(x)


@hybridized_or_not
def test_a_shared_average_advances_once_when_the_branches_are_graphs_of_their_own(hybridized):
    averages_once_per_step(TwoParts(), hybridized)


@hybridized_or_not
def test_the_gradient_flows_back_through_both_branches(hybridized):
    net, _ = branches(rules=[{'pattern': '*', 'weight': 'none', 'activation': 'int8'}])
    net.hybridize(hybridized)
    x = nd.array([[1.0, -2.0, 3.0, 0.5]])
    x.attach_grad()
    with autograd.record():
        out = net(x)
    out.backward()
    expected = (net.a.weight.data() + net.b.weight.data()).sum(axis=0).asnumpy()
    np.testing.assert_allclose(x.grad.asnumpy()[0], expected, rtol=1e-6, atol=1e-7)     # order of float32 sums


# ---------------------------------------------------------------- a layer that is used twice


class Twice(nn.HybridBlock):
    """One layer on two tensors."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = nn.Dense(4, in_units=4)

    def hybrid_forward(self, F, x):
        return self.dense(F.relu(self.dense(x)))


@hybridized_or_not
def test_a_layer_used_twice_sees_both_inputs_and_trains(seed, hybridized):
    net = Twice()
    net.initialize(init.One())
    gq.convert(net, method='int8', first_last_bits=8)
    assert net.dense.input_quantizer.grid.signed        # one of its inputs is the image
    bounds = gq.calibrate(net, [nd.ones((1, 4))], observer='minmax')
    net.hybridize(hybridized)
    train_step(net, nd.ones((1, 4)))
    assert bounds == {'dense.input_quantizer': pytest.approx((-4, 4))}      # 127 times a float32 scale
    assert np.abs(net.dense.weight.grad().asnumpy()).max() > 0


def test_two_layers_on_one_parameter_have_quantizers_of_their_own(seed):
    net = nn.HybridSequential()
    first = nn.Dense(4, in_units=4)
    net.add(first, nn.Activation('relu'), nn.Dense(4, in_units=4, params=first.params))
    net.initialize()
    gq.calibrate(gq.convert(net), [nd.ones((2, 4))])
    assert net[0].weight is net[2].weight and len(quantizers(net)) == 4
    train_step(net, nd.ones((2, 4)))


class ThreeReaders(Branches):
    def hybrid_forward(self, F, x):
        return self.a(x) + self.b(x) + self.a(x)


@hybridized_or_not
def test_a_layer_used_twice_on_a_shared_tensor_advances_the_average_once(hybridized):
    averages_once_per_step(ThreeReaders(), hybridized)


# ---------------------------------------------------------------- refusals: the net stays as it was


REFUSED = [
    ({'bits': 0}, ValueError, 'bits=0 is not a bit width: pass an integer from 1 to 16'),
    ({'bits': 2.5}, ValueError, r'bits=2\.5 is not a bit width'),
    ({'bits': 33}, ValueError, 'bits=33 is not a bit width'),
    ({'bits': True}, ValueError, 'bits=True is not a bit width'),
    ({'bits': '4'}, ValueError, "bits='4' is not a bit width"),
    ({'weight_bits': 0}, ValueError, 'weight_bits=0 is not a bit width'),
    ({'activation_bits': '4'}, ValueError, "activation_bits='4' is not a bit width"),
    ({'first_last_bits': 99}, ValueError, 'first_last_bits=99 is not a bit width'),
    ({'gradient_bits': 0}, ValueError, 'gradient_bits=0 is not a bit width'),
    ({'rules': [{'pattern': '2', 'bits': 2.5}]}, ValueError, r"layer '2' \(Conv2D 4 -> 6\): bits=2\.5"),
    ({'bits': 1}, ValueError, r"layer '2' \(Conv2D 4 -> 6\): bits=1: .* supports 2 to 16 bits.*exclude=\['2'\]"),
    ({'bits': 9, 'method': 'pact'}, ValueError, r"layer '2' \(Conv2D 4 -> 6\): bits=9: SAWB supports 2 to 8 bits"),
    ({'method': 'lqs'}, ValueError, "unknown method 'lqs'. Did you mean 'lsq'.*dorefa, fqn, gdrq, int8"),
    ({'weight': 'dorefas'}, ValueError, "unknown weight quantizer 'dorefas'. Did you mean 'dorefa'"),
    ({'activation': 'sawb'}, ValueError, "'sawb' quantizes weights only. For a activation use one of|'sawb' quantizes"),
    ({'rules': [{'pattern': '2', 'activation': 'pcat'}]}, ValueError, "'pcat'. Did you mean 'pact'"),
    ({'exclude': ['9']}, ValueError, "pattern '9' matches no layer.*Layers: '0', '2', '4', '6'"),
    ({'rules': [{'pattern': 'feature.*'}]}, ValueError, "pattern 'feature.*' matches no layer"),
    ({'rules': [{'patern': '2'}]}, TypeError, 'patern'),
    ({'exclude': ['*']}, ValueError, 'leave no layer to quantize'),
    ({'weight_options': {'ktime': 2}}, TypeError, r"layer '2' \(Conv2D 4 -> 6\): .*ktime"),
    ({'method': 'gdrq', 'activation_options': {'lam': 7}}, ValueError, r"layer '2' \(Conv2D 4 -> 6\): lam=7"),
    ({'method': 'qil', 'per_channel': True}, ValueError, r"layer '2' \(Conv2D 4 -> 6\): per_channel=True: QIL"),
    ({'weight': 'gdrq', 'weight_options': {'group_size': 4}}, ValueError, r"layer '2' .*group_size=4 does not divide"),
]


@pytest.mark.parametrize('options, error, message', REFUSED, ids=[str(options) for options, _, _ in REFUSED])
def test_a_refused_call_says_why_and_leaves_the_net(net, options, error, message):
    before = Snapshot(net)
    with pytest.raises(error, match=message):
        gq.convert(net, **options)
    before.check()


def test_after_a_refusal_the_net_converts_as_if_nothing_had_been(seed):
    net, other = small(), small()
    with pytest.raises(ValueError, match='bits=1'):
        gq.convert(net, bits=1)
    assert list(gq.convert(net).collect_params()) == list(gq.convert(other).collect_params())


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_path():
    net = residual()
    before = Snapshot(net, images(size=32))
    with pytest.raises(ValueError, match=r"'features.3.0.downsampl' matches no layer. Did you mean 'f.*and 14 more"):
        gq.convert(net, exclude=['features.3.0.downsampl'])
    before.check()


def test_a_layer_in_the_message_has_its_full_path_and_channels():
    net = residual()
    net(images(size=32))
    with pytest.raises(ValueError, match=r"layer 'features.3.0.body.0' \(Conv2D 16 -> 32\): bits=1"):
        gq.convert(net, rules=[{'pattern': 'features.3.0.body.0', 'bits': 1}])


def test_grouped_channels_are_counted_in_full(net):
    with pytest.raises(ValueError, match=r"layer '4' \(Conv2D 6 -> 6\)"):
        gq.convert(net, rules=[{'pattern': '4', 'bits': 1}])


def test_converting_twice_is_refused_and_the_first_conversion_stays(net):
    gq.calibrate(gq.convert(net), [images()])
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match="already converted: '0' is a QConv2D"):
        gq.convert(net)
    before.check()


def test_a_net_that_has_run_hybridized_is_refused(net):
    net.hybridize()
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match=r"the net.*HybridSequential.* has already run.*net.hybridize\(False\)"):
        gq.convert(net)
    before.check()


def test_a_child_that_has_run_hybridized_is_named(seed):
    net = nn.Sequential()
    net.add(small(), nn.Dense(2))
    net.initialize()
    net.hybridize()
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match=r"'0' \(HybridSequential\) is hybridized and has already run"):
        gq.convert(net)
    before.check()


def test_the_way_out_of_a_hybridized_net_works(net):
    net.hybridize()
    net(images())
    net.hybridize(False)
    assert len(layers(gq.convert(net))) == 4


def test_a_net_without_layers_to_convert_is_refused():
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.Activation('relu'))
    net.initialize()
    before = Snapshot(net)
    with pytest.raises(ValueError, match='HybridSequential has no layer to quantize: .*Conv1D, Conv2D, .*Dense'):
        gq.convert(net)
    before.check()


@pytest.mark.parametrize('net', [3, None, [nn.Dense(2)], mx.sym.var('data')])
def test_something_that_is_no_block_is_refused(net):
    with pytest.raises(TypeError, match=f'net is a {type(net).__name__}, not a gluon Block'):
        gq.convert(net)


# ---------------------------------------------------------------- training before calibration


@hybridized_or_not
@pytest.mark.parametrize('inference_first', [False, True], ids=['at once', 'after inference'])
@pytest.mark.parametrize('method', ['lsq', 'qil'])
def test_training_before_calibration_is_refused_by_layer(net, hybridized, inference_first, method):
    gq.convert(net, method=method)
    net.hybridize(hybridized)
    if inference_first:
        with pytest.warns(UserWarning, match='not calibrated: its input passes unquantized'):
            net(images())
    with pytest.raises(RuntimeError, match=r'2.input_quantizer \(\w+Activation\) has no range yet.*gq.calibrate'):
        train_step(net, images())


@hybridized_or_not
def test_calibrating_after_that_refusal_is_enough(net, hybridized):
    gq.convert(net)
    net.hybridize(hybridized)
    with pytest.raises(RuntimeError, match='has no range yet'):
        train_step(net, images())
    gq.calibrate(net, [images()])
    train_step(net, images())
    assert np.abs(net[2].weight.grad().asnumpy()).max() > 0


def test_a_net_that_is_initialized_again_has_lost_its_calibration(net):
    gq.calibrate(gq.convert(net), [images()])
    net.initialize(force_reinit=True)
    with pytest.raises(RuntimeError, match='2.input_quantizer .* has no range yet'):
        train_step(net, images())
