"""`to_mxnet_int8`: trained grids on MXNet's integer operators."""
import json

import mxnet as mx
import numpy as np
import pytest
from int8_nets import Net, data, quantized, residual
from mxnet import gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.integer import Runner
from gluonquant.mxnet_int8 import codes, to_mxnet_int8
from gluonquant.symbol_graph import QUANTIZE, evaluate

# Of all codes. float32 rounds otherwise than exact arithmetic next to ties, about once in 1e5 codes, and what reads
# such a code moves with it.
EQUAL = 0.999
# Where codes are moved to another type, or have a zero point, MXNet rounds the bias anew: by half a step of the sum,
# which for 16 channels is up to 1e-2 steps of the output.
MOVED = 0.99


def concat(F, x, net):
    return net.depthwise(F.slice_axis(F.concat(net.a(x), F.relu(net.b(x)), dim=1), axis=1, begin=8, end=24))


def relu6(F, x, net):
    return net.c(F.clip(net.depthwise(F.clip(net.a(x), 0, 0.5)), 0, 6))


def preactivation(F, x, net):
    x = x + net.a(F.relu(net.a_norm(x)))
    return F.relu(net.b_norm(x + net.b(F.relu(x - 0.2))))


def max_pooling(F, x, net):
    x = F.relu(F.Pooling(net.a(x), kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type='max'))
    return net.c(F.Pooling(net.b(x), kernel=(2, 2), stride=(2, 2), pool_type='max', pooling_convention='full'))


def average_pooling(F, x, net):
    return net.c(F.Pooling(F.relu(net.a(x)), kernel=(2, 2), stride=(2, 2), pool_type='avg'))


def flatten(F, x, net):
    return F.expand_dims(F.expand_dims(F.relu(net.dense(F.flatten(F.relu(net.a(x))))), 2), 3)


def moves(F, x, net):
    first, second = F.split(F.transpose(F.relu(net.a(x)), axes=(0, 1, 3, 2)), num_outputs=2, axis=1)
    return net.c(F.tile(F.concat(F.swapaxes(first, 2, 3), second, dim=1), reps=(1, 1, 2, 1)))


def grouped(F, x, net):
    return net.grouped(net.depthwise(x))


def transposed(F, x, net):
    return net.c(F.LeakyReLU(net.up(x), slope=0.1))


BODIES = [residual, concat, relu6, preactivation, max_pooling, average_pooling, flatten, moves, grouped, transposed]


def share_of_equal(final, x, tmp_path, target='openvino'):
    """(share of codes that MXNet and exact integer arithmetic have in common, difference of outputs)."""
    path = str(tmp_path / 'net.onnx')
    gq.export_onnx(final, path, x.shape, target)
    runner, made = Runner(path), to_mxnet_int8(final)
    reference, mine = runner(x.asnumpy(), keep='codes'), codes(made, x)
    equal = [(mine[node] == reference[name].astype(int) - shift).reshape(-1)
             for name, _, shift, node in json.loads(runner.model.metadata['gluonquant'])['tensors']]
    return np.concatenate(equal).mean(), abs(made(x).asnumpy() - reference['output']).max()


def gluon_codes(final, x):
    """{node: codes} of the fake-quantized net."""
    found = {}

    def run(F, node, arrays):
        if node.op == QUANTIZE:
            found[node.name] = final._children[node.attrs['quantizer']].quantize(arrays[0]).asnumpy()
        return final._run(F, node, arrays)
    values = {name: final.parameter(name).data() for name in final.paths}
    evaluate(nd, [*final.graph.nodes(), final.graph.heads], {**values, 'data': x}, run)
    return found


@pytest.mark.parametrize('body', BODIES, ids=lambda body: body.__name__)
def test_codes_equal_exact_integer_arithmetic(body, rng, tmp_path):
    net, x = quantized(body, rng)
    equal, difference = share_of_equal(gq.finalize(net), x, tmp_path)
    assert equal >= (MOVED if body is residual else EQUAL)
    assert difference < 0.01 * abs(net(x).asnumpy()).max()


@pytest.mark.parametrize('options', [{'target': 'onnxruntime'}, {'target': 'tensorrt'}, {'target': None},
                                     {'method': 'pact'}, {'method': 'qil'}, {'method': 'lsq', 'bits': 4},
                                     {'method': 'int8', 'bits': 4}], ids=str)
def test_every_grid_is_kept(options, rng, tmp_path):
    net, x = quantized(residual, rng, **options)
    target = options.get('target') or 'openvino'
    equal, _ = share_of_equal(gq.finalize(net), x, tmp_path, target)
    assert equal >= (EQUAL if options.get('target', 'onednn') != 'onednn' else MOVED)


@pytest.mark.parametrize('activation', ['affine', 'fqn', 'lsqplus'])
def test_zero_points_are_kept(activation, rng):
    net, x = quantized(residual, rng, method=None, weight='int8', activation=activation)
    net = gq.finalize(net)
    made = to_mxnet_int8(net)
    mine, theirs = codes(made, x), gluon_codes(net, x)
    equal = np.concatenate([(mine[name] == theirs[name]).reshape(-1) for name in mine])
    assert equal.mean() >= MOVED
    reasons = {step.reason for step in made.steps if step.how == 'float'}
    assert reasons <= {'the zero point of its input is not 0, but MXNet pads integers with 0'}


def test_layers_run_fused(rng):
    net, _ = quantized(residual, rng)
    steps = to_mxnet_int8(net, strict=True).steps
    assert {(step.op, step.how) for step in steps} == {('Convolution', 'fused'), ('FullyConnected', 'integer')}
    assert {step.reason for step in steps} == {'', 'its bias is rounded anew, because codes are moved'}


def test_bounds_inside_the_type_are_kept_and_told(rng):
    def linear(F, x, net):
        return net.c(net.a(x))
    net, x = quantized(linear, rng, activation_options={'narrow_range': True})
    final = gq.finalize(net)
    made = to_mxnet_int8(final)
    steps = {step.node: step.reason for step in made.steps}
    assert steps['a'] == 'a further operator clips codes to -127..127'
    lowest = [array.min() for array in codes(made, 1000 * x).values()]
    assert lowest.count(-127) >= 3 and min(lowest) == -127      # of the images, and behind a and c


def test_a_final_net_a_converted_net_and_an_attached_net_are_taken(rng):
    net, x = quantized(residual, rng)
    outputs = [to_mxnet_int8(source)(x).asnumpy() for source in (net, gq.finalize(net))]
    np.testing.assert_array_equal(*outputs)
    converted = nn.HybridSequential()
    converted.add(nn.Conv2D(8, 3), nn.BatchNorm(), nn.Activation('relu'), nn.Conv2D(8, 3), nn.MaxPool2D(), nn.Dense(5))
    converted.initialize()
    converted(x)
    gq.convert(converted, bits=8)
    gq.calibrate(converted, [x], batches=1)
    expected = gq.finalize(converted)(x).asnumpy()
    np.testing.assert_allclose(to_mxnet_int8(converted)(x).asnumpy(), expected, atol=0.01 * abs(expected).max())


def test_the_net_stays_as_it_is(rng):
    net, x = quantized(residual, rng)
    before, text = net(x).asnumpy(), net.graph.dump()
    to_mxnet_int8(net)
    np.testing.assert_array_equal(net(x).asnumpy(), before)
    assert net.graph.dump() == text


@pytest.mark.parametrize('static', [False, True])
def test_batch_sizes_may_change(static, rng):
    net, x = quantized(residual, rng)
    made = to_mxnet_int8(net)
    single = [made(x[i:i + 1]).asnumpy() for i in range(3)]
    made.hybridize(static_alloc=static, static_shape=static)
    for count in (3, 1, 3, 2):
        np.testing.assert_array_equal(made(x[:count]).asnumpy(), np.concatenate(single[:count]))


def test_export_and_load_keep_outputs_and_codes(rng, tmp_path):
    net, x = quantized(residual, rng)
    made = to_mxnet_int8(net)
    made.hybridize(static_alloc=True, static_shape=True)
    expected = made(x).asnumpy()
    made.export(str(tmp_path / 'int8'))
    again = gluon.SymbolBlock.imports(str(tmp_path / 'int8-symbol.json'), ['data'], str(tmp_path / 'int8-0000.params'))
    np.testing.assert_array_equal(again(x).asnumpy(), expected)
    mine, theirs = codes(again, x), codes(made, x)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_errors_name_what_was_wrong(rng):
    with pytest.raises(TypeError, match='net is a int'):
        to_mxnet_int8(3)
    with pytest.raises(ValueError, match='has no quantizer'):
        to_mxnet_int8(initialized(rng))
    net, x = quantized(residual, rng, weight_bits=8, activation_bits=9)
    with pytest.raises(ValueError, match='int8 with 9 bits reach from .*. Quantize activations to at most 8'):
        to_mxnet_int8(net)
    with pytest.raises(ValueError, match='has no integer tensors'):
        codes(gluon.SymbolBlock(mx.sym.var('data') + 1, [mx.sym.var('data')]), x)


def initialized(rng):
    net = Net(residual)
    net.initialize()
    net(data(rng))
    return net


def test_a_net_that_is_switched_off_is_refused_even_if_it_is_final(rng):
    net = gq.finalize(quantized(residual, rng)[0])
    gq.set_mode(net, 'off')
    with pytest.raises(RuntimeError, match='switched off'):
        to_mxnet_int8(net)


def test_strict_refuses_layers_in_float(rng):
    net, _ = quantized(transposed, rng)
    to_mxnet_int8(net)
    with pytest.raises(ValueError, match="Deconvolution 'up' cannot run on integers: MXNet has no integer transposed .*"
                                         'Pass strict=False to run it in float'):
        to_mxnet_int8(net, strict=True)


def test_steps_say_why_a_layer_is_not_fused(rng):
    steps = {step.node: step for step in to_mxnet_int8(quantized(grouped, rng)[0]).steps}
    assert steps['grouped'].how == 'float' and 'but not of 4' in steps['grouped'].reason
    steps = {step.node: step for step in to_mxnet_int8(quantized(residual, rng, bits=4, method='lsq')[0]).steps}
    assert steps['a'].how == 'integer' and 'none of them 127' in steps['a'].reason
    assert steps['depthwise'].how == 'float' and 'signed' in steps['depthwise'].reason


@pytest.mark.filterwarnings('ignore:Cannot decide')
def test_a_trained_net_agrees_with_the_net_that_trains(shared):
    model_zoo = pytest.importorskip('gluoncv', reason='needs gluoncv for cifar_resnet20').model_zoo
    batches = pytest.importorskip('recipes.data', reason='needs the recipes')
    net = model_zoo.get_model('cifar_resnet20_v1', classes=10)
    net.load_parameters(str(shared / 'weights' / 'cifar_resnet20_v1.params'))
    train, val, _ = batches.read_directory(str(shared / 'data' / 'cifar10'), None)
    calibration, images = pixels(train, 128), pixels(val, 500)
    net = gq.attach(net, bits=8, method='int8', target='onednn')
    gq.calibrate(net, [nd.array(calibration)], batches=1)
    final = gq.finalize(net)
    made = to_mxnet_int8(final, strict=True)
    assert sum(step.how == 'fused' for step in made.steps) == 21
    final.hybridize(static_alloc=True, static_shape=True)
    made.hybridize(static_alloc=True, static_shape=True)
    mine, theirs = (np.concatenate([block(nd.array(images[i:i + 50])).asnumpy() for i in range(0, 500, 50)])
                    for block in (made, final))
    assert (mine.argmax(1) == theirs.argmax(1)).mean() >= 0.99


def pixels(source, count):
    """Normalized images (count, 3, 32, 32) from the centre."""
    found = []
    for number in np.random.RandomState(0).permutation(len(source))[:count]:
        image, _ = source.read(int(number))
        top, left = ((size - 32) // 2 for size in image.shape[:2])
        found.append(image[top:top + 32, left:left + 32])
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    return ((np.stack(found).astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
