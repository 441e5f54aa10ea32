"""What MXNet's integer operators do wrong, so that it is known when a way around is needed no longer."""
import mxnet as mx
import numpy as np
import pytest
from int8_nets import Fused
from mxnet import nd
from mxnet.base import MXNetError

from gluonquant.mxnet_int8 import forms, layers

RIGHT = 0.999       # of 5184 codes: float32 rounds other than float64 where a value lies within 1e-5 of a tie


@pytest.mark.parametrize('dtype', ['uint8', 'int8'])
@pytest.mark.parametrize('out', ['uint8', 'int8'])
def test_fused_convolution_is_exact(rng, dtype, out):
    assert Fused(rng, dtype, out).equal() >= RIGHT


@pytest.mark.parametrize('dtype', ['uint8', 'int8'])
def test_depthwise_convolution_is_exact(rng, dtype):
    assert Fused(rng, dtype, groups=16).equal() >= RIGHT


@pytest.mark.parametrize('out, steps', [('uint8', 255), ('int8', 127)])
def test_ranges_of_255_and_127_steps_are_wrong(rng, monkeypatch, out, steps):
    monkeypatch.setattr(layers, 'calibrated', lambda scale, dtype: {
        'min_calib_range': 0 if dtype == 'uint8' else -steps * scale, 'max_calib_range': steps * scale})
    assert Fused(rng, out=out).equal() < 0.95


def test_weights_that_do_not_reach_127_are_rounded_to_another_grid(rng, monkeypatch):
    def plain(codes, step, data_scale, bias):
        return (codes * step.reshape(-1, 1, 1, 1)).astype(np.float32), 1.0, 0
    monkeypatch.setattr(layers, 'imposed', plain)
    assert Fused(rng, most=100).equal() < 0.95


@pytest.mark.parametrize('out, rest, right', [('uint8', 'uint8', True), ('int8', 'int8', True),
                                              ('uint8', 'int8', False), ('int8', 'uint8', False)])
def test_a_shortcut_of_another_type_than_the_output_is_wrong(rng, out, rest, right):
    equal = Fused(rng, out=out, rest=rest).equal()
    assert equal >= RIGHT if right else equal < 0.95


@pytest.mark.parametrize('groups', [2, 8])
def test_groups_are_wrong(rng, groups):
    assert Fused(rng, groups=groups).equal() < 0.9


def test_cast_leaves_a_note_that_sums_believe(rng):
    x, w = rng.integers(0, 256, (2, 16, 8, 8)), rng.integers(-127, 128, (16, 16, 3, 3))
    ends = [nd.array([end]) for end in (0, 255.5, -127.5, 127.5)]
    variables = [mx.sym.var(name) for name in 'xwabcd']
    sums = mx.sym.contrib.quantized_conv(*variables[:2], min_data=variables[2], max_data=variables[3],
                                         min_weight=variables[4], max_weight=variables[5], kernel=(3, 3), pad=(1, 1),
                                         num_filter=16, no_bias=True)[0]
    cast = mx.sym.Cast(sums, dtype='float32')
    given = dict(zip('xwabcd', [nd.array(x, dtype='uint8'), nd.array(w, dtype='int8'), *ends]), y=nd.ones(x.shape))
    right = nd.Convolution(*(nd.array(array, dtype='float64') for array in (x, w)), kernel=(3, 3), pad=(1, 1),
                           num_filter=16, no_bias=True).asnumpy() + 1

    def run(floats):
        symbol = mx.sym.elemwise_add(floats, mx.sym.var('y'))
        return mx.nd.CachedOp(symbol)(*(given[name] for name in symbol.list_inputs())).asnumpy()
    assert (run(cast) == right).mean() < 0.5
    np.testing.assert_array_equal(run(mx.sym.slice_axis(cast, axis=0, begin=0, end=None)), right)


@pytest.mark.parametrize('dtype, groups, message', [('int8', 1, 'only supports uint8'), ('uint8', 2, 'num_group')])
def test_the_convolution_with_integer_output_refuses(dtype, groups, message):
    ends = dict(zip(('min_data', 'max_data', 'min_weight', 'max_weight'), nd.array([0, 1, 0, 1]).split(4, axis=0)))
    with pytest.raises(MXNetError, match=message):
        nd.contrib.quantized_conv(data=nd.ones((1, 4, 5, 5), dtype=dtype), kernel=(3, 3), num_filter=4, no_bias=True,
                                  weight=nd.ones((4, 4 // groups, 3, 3), dtype='int8'), num_group=groups,
                                  **ends)[0].wait_to_read()


def test_integers_are_not_padded():
    with pytest.raises(MXNetError, match='floating point'):
        nd.pad(nd.ones((1, 1, 2, 2), dtype='uint8'), mode='constant', pad_width=(0, 0, 0, 0, 1, 1, 1, 1)).asnumpy()


@pytest.mark.parametrize('dtype, lowest', [('uint8', 0), ('int8', -128)])
def test_the_lowest_code_is_that_of_the_type(dtype, lowest):
    form = forms.Form(1.0, dtype, 0, 0, 0, 0, 1.0, 0.0)
    codes, _, _ = nd.contrib.quantize_v2(nd.array([-1000.0, 1000]), out_type=dtype, **{
        key: float(value) for key, value in forms.calibrated(form.scale, dtype).items()})
    assert codes.asnumpy().tolist() == [lowest, lowest + 255]
