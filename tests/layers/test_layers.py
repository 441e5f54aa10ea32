"""Quantized layers: the float layer, applied to fake-quantized tensors."""
import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import LAYERS

# name -> (float layer, shape of its input)
KINDS = {
    'conv1d': (lambda **kw: nn.Conv1D(4, 3, **kw), (2, 3, 9)),
    'conv2d': (lambda **kw: nn.Conv2D(4, 3, strides=2, padding=1, **kw), (2, 3, 8, 8)),
    'conv3d': (lambda **kw: nn.Conv3D(4, 2, **kw), (2, 3, 4, 4, 4)),
    'transposed': (lambda **kw: nn.Conv2DTranspose(4, 3, strides=2, **kw), (2, 3, 5, 5)),
    'dense': (lambda **kw: nn.Dense(4, **kw), (2, 3, 2)),
    'dense on the last axis': (lambda **kw: nn.Dense(4, flatten=False, **kw), (2, 5, 3)),
    'grouped': (lambda **kw: nn.Conv2D(4, 3, groups=2, **kw), (2, 6, 8, 8)),
    'depthwise': (lambda **kw: nn.Conv2D(6, 3, groups=6, **kw), (2, 6, 8, 8)),
    'grouped transposed': (lambda **kw: nn.Conv2DTranspose(4, 3, groups=2, in_channels=6, **kw), (2, 6, 5, 5)),
}
EXTRAS = {'plain': {'use_bias': False}, 'bias': {'bias_initializer': init.Uniform(1)},
          'bias and relu': {'bias_initializer': init.Uniform(1), 'activation': 'relu'}}
every_kind = pytest.mark.parametrize('kind', KINDS)
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


def made(kind, **kwargs):
    """A float layer with weights, and an input."""
    make, shape = KINDS[kind]
    layer = make(**kwargs)
    layer.initialize(init.Normal(0.5))
    x = nd.random.normal(shape=shape)
    layer(x)
    return layer, x


def converted(layer, x, **options):
    gq.convert(layer, **{'bits': 4, 'first_last_bits': 4, 'method': 'int8', 'signed': True, **options})
    gq.calibrate(layer, [x])
    return layer


def by_hand(layer, x):
    """The float layer applied to the codes times the scales."""
    weight = layer.weight.data()
    wq, iq = layer.weight_quantizer, layer.input_quantizer
    shape = [1] * weight.ndim
    scale = wq.qparams().scale
    shape[wq.axis if len(scale) > 1 else 0] = -1
    fake_weight = wq.quantize(weight).astype('float32') * nd.array(scale.reshape(shape))
    fake_x = iq.quantize(x).astype('float32') * nd.array(iq.qparams().scale)
    layer.to_float()
    weight[:] = fake_weight
    return layer(fake_x)


@every_kind
@pytest.mark.parametrize('extra', EXTRAS)
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_the_output_is_the_float_layer_applied_to_fake_quantized_tensors(seed, kind, extra, training):
    layer, x = made(kind, **EXTRAS[extra])
    converted(layer, x)
    gq.freeze(layer)        # no statistics move in training
    with autograd.record(train_mode=training):
        y = layer(x)
    np.testing.assert_array_equal(y.asnumpy(), by_hand(layer, x).asnumpy())


@every_kind
def test_the_hybridized_output_is_the_same_to_the_last_bit(seed, kind):
    layer, x = made(kind, activation='relu')
    y = converted(layer, x)(x).asnumpy()
    layer.hybridize(static_alloc=True, static_shape=True)
    np.testing.assert_array_equal(layer(x).asnumpy(), y)


@every_kind
def test_the_output_is_not_the_float_one(seed, kind):
    layer, x = made(kind)
    y = layer(x).asnumpy()
    assert not np.array_equal(converted(layer, x)(x).asnumpy(), y)


@every_kind
def test_a_per_channel_scale_is_the_largest_weight_of_its_output_channel(seed, kind):
    layer, x = made(kind)
    weight = layer.weight.data().asnumpy()
    scale = converted(layer, x, per_channel=True).weight_quantizer.qparams().scale
    axis = 1 if 'transposed' in kind else 0
    others = None if kind == 'grouped transposed' else tuple(set(range(weight.ndim)) - {axis})
    # one float32 division, whose result may be the neighbouring float
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=others).reshape(-1) / 7, rtol=2e-7)


def test_a_grouped_transposed_convolution_falls_back_to_one_scale(seed):
    layer, x = made('grouped transposed')
    assert converted(layer, x, per_channel=True).weight_quantizer.qparams().scale.shape == (1,)


@every_kind
def test_to_float_gives_back_class_parameters_and_output(seed, kind):
    layer, x = made(kind, activation='relu')
    kind_before, names, y = type(layer), list(layer.collect_params()), layer(x).asnumpy()
    assert converted(layer, x).to_float() is layer
    assert (type(layer), list(layer.collect_params()), list(layer._children)) == (kind_before, names, ['act'])
    np.testing.assert_array_equal(layer(x).asnumpy(), y)


def test_to_float_forgets_the_graph_of_the_quantized_layer(seed):
    layer, x = made('conv2d')
    y = layer(x).asnumpy()
    converted(layer, x).hybridize()
    layer(x)
    layer.to_float()
    np.testing.assert_array_equal(layer(x).asnumpy(), y)


def test_a_converted_layer_can_be_converted_again_after_to_float(seed):
    layer, x = made('conv2d')
    y = converted(layer, x)(x).asnumpy()
    layer.to_float()
    np.testing.assert_array_equal(converted(layer, x)(x).asnumpy(), y)


@pytest.mark.parametrize('kind, layout', [(nn.Conv2D, 'NHWC'), (nn.Conv3D, 'NDHWC'), (nn.Conv2DTranspose, 'NHWC')])
def test_a_channel_last_layer_is_refused_by_name_and_the_net_stays(kind, layout):
    net = nn.HybridSequential()
    net.add(nn.Dense(2), kind(4, 3, layout=layout))
    names = list(net.collect_params())
    with pytest.raises(ValueError, match=rf"layer '1' \({kind.__name__}\) has layout {layout}; only channel-first"):
        gq.convert(net)
    assert [type(layer) for layer in net] == [nn.Dense, kind] and list(net.collect_params()) == names


def test_a_channel_last_layer_that_is_excluded_stays_float():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, layout='NHWC'), nn.Dense(2))
    gq.convert(net, exclude=['0'])
    assert [type(layer) for layer in net] == [nn.Conv2D, LAYERS[nn.Dense]]


@every_kind
@hybridized_or_not
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_unknown_input_channels_are_inferred_through_the_quantizers(seed, kind, hybridized, training):
    make, shape = KINDS[kind]
    layer, known = make(), made(kind)[0]
    layer.initialize()
    gq.convert(layer, bits=4, first_last_bits=4, method='int8')
    layer.hybridize(hybridized)
    with autograd.record(train_mode=training):
        layer(nd.ones(shape)).wait_to_read()
    assert layer.weight.shape == known.weight.shape


@every_kind
@hybridized_or_not
def test_calibration_infers_unknown_input_channels(seed, kind, hybridized):
    make, shape = KINDS[kind]
    layer = make()
    layer.initialize()
    gq.convert(layer, bits=4, first_last_bits=4, method='lsq', signed=True)
    layer.hybridize(hybridized)
    x = nd.random.normal(shape=shape)
    gq.calibrate(layer, [x])
    np.testing.assert_array_equal(layer(x).asnumpy(), by_hand(layer, x).asnumpy())


@every_kind
@hybridized_or_not
def test_the_weight_gradient_of_a_straight_through_weight_is_that_of_the_fake_quantized_layer(seed, kind, hybridized):
    layer, x = made(kind)
    weight = layer.weight
    converted(layer, x)
    layer.hybridize(hybridized)
    gq.freeze(layer)
    with autograd.record():
        y = layer(x)
    head = nd.random.normal(shape=y.shape)
    y.backward(head)
    got = weight.grad().asnumpy()
    assert layer.weight is weight
    layer.hybridize(False)
    fake_x = layer.input_quantizer(x)
    by_hand(layer, x)       # leaves the fake-quantized weight in the float layer
    with autograd.record():
        y = layer(fake_x)
    y.backward(head)
    np.testing.assert_allclose(got, weight.grad().asnumpy(), rtol=1e-5, atol=1e-5)     # order of float32 sums


def test_a_trainer_moves_the_float_weight(seed):
    layer, x = made('conv2d')
    before = layer.weight.data().asnumpy()
    converted(layer, x)
    trainer = gluon.Trainer(layer.collect_params(), 'sgd', {'learning_rate': 0.5})
    with autograd.record():
        y = layer(x)
    y.backward()
    gradient = layer.weight.grad().asnumpy()
    trainer.step(1)
    assert np.abs(gradient).max() > 0
    np.testing.assert_array_equal(layer.weight.data().asnumpy(), before - np.float32(0.5) * gradient)


def test_a_subclass_of_a_layer_is_left_alone():
    class Own(nn.Dense):
        pass

    net = nn.HybridSequential()
    net.add(Own(2), nn.Dense(2))
    assert type(gq.convert(net)[0]) is Own and type(net[1]) is LAYERS[nn.Dense]


def test_the_quantized_layer_keeps_the_fused_activation_as_its_own(seed):
    layer, x = made('conv2d', activation='relu')
    activation = layer.act
    assert converted(layer, x).act is activation


# ---------------------------------------------------------------- gradient quantization


@hybridized_or_not
@pytest.mark.parametrize('bits', [1, 2, 3])
def test_a_quantized_gradient_has_at_most_2_to_the_bits_levels_per_sample(seed, hybridized, bits):
    layer = nn.Dense(50, in_units=5, use_bias=False, flatten=False)
    layer.initialize(init.Normal(0.5))
    gq.convert(layer, method='int8', gradient_bits=bits, activation='none', weight='none')
    layer.hybridize(hybridized)
    x = nd.eye(5).reshape((1, 5, 5)).broadcast_to((3, 5, 5))     # so that the weight's gradient is the output's
    per_sample = []
    for head in nd.random.normal(shape=(3, 5, 50)):
        with autograd.record():
            y = layer(x[:1])
        y.backward(head.expand_dims(0))
        per_sample.append(len(np.unique(layer.weight.grad().asnumpy())))
    nd.waitall()
    assert min(per_sample) >= 2 and max(per_sample) <= 2 ** bits


@hybridized_or_not
def test_a_quantized_gradient_is_right_on_average(seed, hybridized):
    layer = nn.Dense(20, in_units=1, use_bias=False)
    layer.initialize(init.Normal(0.5))
    gq.convert(layer, method='int8', gradient_bits=4, activation='none', weight='none')
    layer.hybridize(hybridized)
    head, total = nd.random.uniform(-1, 1, shape=(1, 20)), 0
    for _ in range(200):
        with autograd.record():
            y = layer(nd.ones((1, 1)))
        y.backward(head)
        total = total + layer.weight.grad().asnumpy().reshape(-1)
    nd.waitall()
    step = 2 * np.abs(head.asnumpy()).max() / 15
    # a stochastic rounding is off by at most half a step on average: 0.5 / sqrt(200) = 0.035 steps, times 5 sigmas
    assert np.abs(total / 200 - head.asnumpy().reshape(-1)).max() < 0.18 * step


@hybridized_or_not
def test_a_net_with_quantized_gradients_learns(seed, hybridized):
    net = nn.HybridSequential()
    net.add(nn.Dense(16, activation='relu'), nn.Dense(1))
    net.initialize(init.Xavier())
    x = nd.random.uniform(-1, 1, shape=(32, 4))
    target = x.sum(axis=1, keepdims=True)
    net(x)
    gq.convert(net, bits=8, method='int8', gradient_bits=4)
    net.hybridize(hybridized)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    losses = []
    for _ in range(40):
        with autograd.record():
            loss = ((net(x) - target) ** 2).mean()
        loss.backward()
        trainer.step(1)
        losses.append(loss.asscalar())
    nd.waitall()
    assert losses[-1] < losses[0] / 4
