"""`finalize`: the net as it is deployed."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd

import gluonquant as gq
from deploy_nets import attached, converted, float_net, images
from gluonquant.finalize import weight_of
from gluonquant.quantizers.bias import _round_half_even
from gluonquant.symbol_graph import BIAS


def layers(net):
    """{label: (layer, bias node)} of the layers whose bias is on a grid."""
    return {net.label(reader): (reader, node) for node in net.graph.nodes() if node.op == BIAS
            for reader in net.graph.readers(node)}


@pytest.mark.parametrize('make', [attached, converted])
def test_outputs_change_by_rounded_biases_only(make):
    net, x = make(8), nd.array(images())
    final = gq.finalize(net)
    for node in final.graph.nodes():        # without bias quantizers, the arithmetic is that of the merged net
        if node.op == BIAS:
            final.graph.redirect(gq.graph.Entry(node), node.inputs[0])
    final._nodes = {}
    # Merging rounds each weight's scale and bias once more, which float32 shows in the last digits.
    np.testing.assert_allclose(final(x).asnumpy(), net(x).asnumpy(), rtol=2e-3, atol=2e-3)


def test_the_net_itself_stays_as_it_is():
    net, x = attached(4), nd.array(images())
    before, nodes = net(x).asnumpy(), len(net.graph.nodes())
    gq.finalize(net)
    assert np.array_equal(net(x).asnumpy(), before)
    assert len(net.graph.nodes()) == nodes


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('make', [attached, converted])
def test_biases_are_whole_numbers_of_steps(bits, make):
    final = gq.finalize(make(bits))
    assert len(layers(final)) == 4
    for layer, node in layers(final).values():
        _, scale, factor = weight_of(final, layer)
        step = final._children[node.attrs['activation']].qparams().scale[0] * scale
        step = step if factor is None else step * abs(factor.reshape(-1))
        steps = final.compute(layer.inputs[2]).asnumpy().astype('float64') / step
        assert abs(steps - np.rint(steps)).max() <= 1e-6 * max(1, abs(steps).max())     # float32 products


def test_biases_beyond_the_reach_of_float32_integers_round_half_to_even():
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 2 ** 22 + 0.5, 2 ** 22 + 1.5, 2 ** 30, -2 ** 30])
    assert np.array_equal(_round_half_even(nd, nd.array(values)).asnumpy(), np.rint(values))


def test_a_final_net_trains():
    final = gq.finalize(attached(4))
    x, label = nd.array(images(16)), nd.array(np.arange(16) % 10)
    final.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(final.collect_params(), 'sgd', {'learning_rate': 0.1, 'momentum': 0.9})
    loss_function, losses = gluon.loss.SoftmaxCrossEntropyLoss(), []
    for _ in range(60):
        with autograd.record():
            loss = loss_function(final(x), label)
        loss.backward()
        trainer.step(16)
        losses.append(loss.mean().asscalar())
    assert losses[-1] < 0.9 * losses[0]
    assert gq.finalize(final)(x).shape == (16, 10)


def test_a_bias_gets_the_gradient_that_it_would_get_unrounded():
    final = gq.finalize(attached(4))
    _, node = layers(final)['out']
    bias = final.parameter(node.inputs[0].node.name)
    with autograd.record():
        out = final(nd.array(images(4))).sum()
    out.backward()
    np.testing.assert_allclose(bias.grad().asnumpy(), np.full(10, 4), rtol=2e-7)     # divided and multiplied by a scale


def test_a_saved_final_net_loads_with_equal_outputs(tmp_path):
    final, x = gq.finalize(attached(4)), nd.array(images())
    gq.save(final, tmp_path / 'net.npz')
    assert np.array_equal(gq.load(tmp_path / 'net.npz')(x).asnumpy(), final(x).asnumpy())


def test_finalizing_twice_changes_nothing():
    final, x = gq.finalize(attached(4)), nd.array(images())
    assert np.array_equal(gq.finalize(final)(x).asnumpy(), final(x).asnumpy())


def tiny_channel(net, value):
    """Make the weights of a channel so small that its bias has no room in int32."""
    weight = net.side.weight.data().asnumpy()
    weight[3] = value
    net.side.weight.set_data(nd.array(weight))
    return net


def test_a_bias_that_int32_cannot_hold_is_named():
    net = attached(8, net=tiny_channel(float_net(), 1e-9), method='int8')
    with pytest.raises(ValueError, match=r"layer 'side': the bias of 1 of 8 channels \(3\) does not fit int32: "
                                         r"channel 3 has -?0\.\d+, which is .*overflow='zero'"):
        gq.finalize(net)


def test_weights_beside_such_a_bias_can_be_left_out():
    net, x = attached(8, net=tiny_channel(float_net(), 1e-9), method='int8'), nd.array(images())
    final = gq.finalize(net, overflow='zero')
    assert np.allclose(final(x).asnumpy(), gq.finalize(attached(8, method='int8', net=tiny_channel(float_net(), 0))
                                                       )(x).asnumpy(), atol=1e-5)


def test_a_channel_without_weights_needs_no_care():
    net = attached(8, net=tiny_channel(float_net(), 0), method='int8')
    codes, _, factor = weight_of(gq.finalize(net), layers(gq.finalize(net))['side'][0])
    assert not codes[3].any() and factor.reshape(-1)[3] == 0


def test_the_lowest_code_moves_where_a_negative_factor_turns_its_sign():
    net = attached(8, weight='lsq')
    quantizer = net._children['main.weight_quantizer']
    quantizer.write(scale=quantizer.value('scale') / 20)        # so that codes reach the ends
    final = gq.finalize(net)
    codes, _, factor = weight_of(final, layers(final)['main'][0])
    negative = factor.reshape(-1) < 0
    assert negative.any() and not negative.all()
    assert codes[negative].min() == -127 and codes[~negative].min() == -128


@pytest.mark.parametrize('break_it, message', [
    (lambda net: gq.set_mode(net, 'off'), 'is switched off'),
    (lambda net: gq.set_phase(net, False), 'only clips in its first phase')])
def test_a_quantizer_that_does_not_quantize_is_named(break_it, message):
    net = attached(4, method='gdrq')
    break_it(net)
    with pytest.raises(RuntimeError, match=message):
        gq.finalize(net)


def test_a_net_without_ranges_is_refused():
    with pytest.raises(RuntimeError, match='has no range yet'):
        gq.finalize(gq.attach(float_net(), 4))


def test_a_float_net_is_refused():
    with pytest.raises(ValueError, match='has no quantizer: quantize it with gq.convert or gq.attach first'):
        gq.finalize(float_net())


def test_what_is_no_net_is_refused():
    with pytest.raises(TypeError, match='pass a net from gq.convert or gq.attach'):
        gq.finalize(mx.sym.var('data'))


def test_offsets_of_lsqplus_become_whole_steps():
    final = gq.finalize(attached(4, weight='lsqplus', activation='lsqplus'))
    found = [child for child in final._children.values() if hasattr(child, 'nudged')]
    assert found and all(child.value('nudged')[0] == 1 for child in found)


@pytest.mark.parametrize('fold', [None, 'frozen', 'merge'])
def test_as_graph_of_a_converted_net_computes_the_same(fold):
    net, x = converted(4), nd.array(images())
    if fold:
        gq.fold(net, fold)
    assert np.array_equal(gq.graph.as_graph(net)(x).asnumpy(), net(x).asnumpy())


def test_as_graph_of_a_converted_net_leaves_the_net_as_it_was():
    net, x = converted(4, gradient_bits=6), nd.array(images())
    gq.fold(net, 'frozen')
    before, classes = net(x).asnumpy(), [type(child) for child in net._children.values()]
    gq.graph.as_graph(net)
    assert [type(child) for child in net._children.values()] == classes
    assert net.main.config.gradient_bits == 6
    assert np.array_equal(net(x).asnumpy(), before)


def test_sums_of_a_final_net_are_whole_numbers_of_steps():
    final = gq.finalize(attached(8, method='int8'))
    layer, node = layers(final)['main']
    final.graph.heads.inputs[:] = [gq.graph.Entry(layer)]
    final._nodes = {}
    sums = final(nd.array(images())).asnumpy().astype('float64')
    quantizer = final._children[node.attrs['bias_quantizer']]
    operands = [final.compute(entry) for entry in node.inputs]
    step = quantizer.steps(nd, *operands)[1].asnumpy().astype('float64').reshape(1, -1, 1, 1)
    # One float32 product behind the sum: half an ulp of it.
    assert abs(sums / step - np.rint(sums / step)).max() <= 2 ** -24 * abs(sums / step).max()
