"""`ranges` and `clipped`: what a quantizer represents, and how much of its tensor it cuts off."""
import numpy as np
import pytest
from mxnet import init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import layers, quantizers


def build():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=2), nn.Activation('relu'), nn.Conv2D(4, 3, in_channels=4),
            nn.Activation('relu'), nn.Dense(3, in_units=64))
    net.initialize(init.Xavier())
    return net


def images(seed=0):
    return nd.array(np.random.default_rng(seed).normal(size=(4, 2, 8, 8)))


@pytest.mark.parametrize('attach', [False, True])
def test_the_share_beyond_a_known_range_is_counted(attach):
    net = build()
    net = gq.attach(net, 4, method='int8') if attach else gq.convert(net, 4, method='int8')
    gq.calibrate(net, [images()], observer='minmax')
    path = next(path for path in quantizers(net, 'activation'))
    quantizer = quantizers(net)[path]
    high = float(quantizer.amax.data().asscalar())
    assert gq.ranges(net)[path] == pytest.approx((-high, high))
    assert gq.clipped(net, [images()])[path] == 0
    quantizer.write(amax=high / 4)
    values = np.abs(images().asnumpy())
    step = high / 4 / quantizer.grid.qmax
    expected = (values > high / 4 + 0.01 * step).mean()
    assert 0.01 < expected < 0.9 and gq.clipped(net, [images()])[path] == pytest.approx(expected)


@pytest.mark.parametrize('method', ['lsq', 'pact', 'gdrq', 'qil', 'fqn', 'dorefa'])
def test_every_method_has_ranges_and_shares_and_reading_changes_nothing(method):
    net = gq.convert(build(), 4, method=method, first_last_bits=4)
    gq.calibrate(net, [images()])
    net.hybridize()
    before = net(images()).asnumpy()
    state = {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}
    ranges, shares = gq.ranges(net), gq.clipped(net, iter([images(), images(1)]), batches=2)
    assert ranges.keys() == shares.keys() == quantizers(net).keys()
    assert all(low < high for low, high in ranges.values()) and all(0 <= share < 0.6 for share in shares.values())
    np.testing.assert_array_equal(net(images()).asnumpy(), before)
    for name, value in state.items():
        np.testing.assert_array_equal(net._collect_params_with_prefix()[name].data().asnumpy(), value)
    assert net._active and net._cached_op is not None


def test_the_weight_that_a_channel_clips_is_counted_against_that_channels_range():
    net = gq.convert(build(), 4, rules=[gq.Rule('2', weight='lsq')])
    gq.calibrate(net, [images()])
    quantizer, weight = layers(net)['2'].weight_quantizer, layers(net)['2'].weight.data().asnumpy()
    top = quantizer.scale.data().asnumpy() if hasattr(quantizer, 'scale') else None
    scale = quantizer.qparams().scale.reshape(-1, 1)
    rows = weight.reshape(4, -1)
    expected = ((rows > 7.01 * scale) | (rows < -8.01 * scale)).mean()
    assert gq.clipped(net, [images()])['2.weight_quantizer'] == pytest.approx(expected)
    low, high = gq.ranges(net)['2.weight_quantizer']
    assert (low, high) == pytest.approx((-8 * scale.max(), 7 * scale.max())) and top is not None


def test_uncalibrated_quantizers_are_left_out_and_an_empty_loader_is_an_error():
    net = gq.convert(build(), 4)
    assert not [path for path in gq.ranges(net) if path.endswith('input_quantizer')]
    with pytest.raises(ValueError, match='no batch'):
        gq.clipped(net, [])
