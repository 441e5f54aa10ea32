"""`export_onnx`: what stands in the file, and what engines make of it."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq
from deploy_nets import SHAPE, attached, converted, float_net, images


def optimized(path, folder):
    """Counter of the operators in ONNX Runtime's optimized graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / 'optimized.onnx')
    onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return Counter(node.op_type for node in onnx.load(str(folder / 'optimized.onnx')).graph.node)


def run(path, x):
    """The output of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return session.run(None, {'data': x})[0]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.onnx')


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_onnx_runtime_gives_what_the_integer_runner_gives(path, bits):
    gq.export_onnx(attached(bits), path, SHAPE)
    x = images(16)
    assert np.array_equal(run(path, x), gq.integer.run(path, x)['output'])


@pytest.mark.parametrize('make', [attached, converted])
@pytest.mark.parametrize('target', ['onnxruntime', 'openvino'])
def test_outputs_are_those_of_the_final_net(path, make, target):
    net = make(4, target=target) if make is attached else make(4)
    final = gq.export_onnx(net, path, SHAPE, target)
    x = images(16)
    # Codes may differ at rounding ties, which random data of this seed do not meet; float32 sums differ in their order.
    np.testing.assert_allclose(run(path, x), final(nd.array(x)).asnumpy(), rtol=1e-5, atol=1e-5)


def test_every_layer_and_sum_is_integer_in_onnx_runtime(path, tmp_path):
    gq.export_onnx(attached(8, method='int8'), path, SHAPE)
    found = optimized(path, tmp_path)
    assert (found['QLinearConv'], found['QLinearAdd'], found['QLinearGlobalAveragePool']) == (3, 1, 1)
    assert found['QGemm'] == 1
    assert not {'Conv', 'Gemm', 'Add', 'Relu', 'DequantizeLinear'} & set(found)


def test_eight_bits_need_no_clip(path):
    gq.export_onnx(attached(8, method='int8'), path, SHAPE)
    assert not any(node.op == 'Clip' for node in gq.integer.read(path).nodes)


def test_no_float_convolution_is_left_in_resnet18(path, tmp_path):
    from gluoncv.model_zoo import get_model
    net = get_model('resnet18_v1b', classes=10)
    net.initialize()
    x = nd.array(np.random.RandomState(0).randn(1, 3, 32, 32))
    net(x)
    made = gq.attach(net, 8, method='int8', target='onnxruntime')
    gq.calibrate(made, [x])
    gq.export_onnx(made, path, x.shape)
    found = optimized(path, tmp_path)
    assert found['QLinearConv'] == 20 and found['QLinearAdd'] == 8 and found['QGemm'] == 1
    assert not {'Conv', 'FusedConv', 'Gemm', 'Add', 'Relu', 'DequantizeLinear'} & set(found)


def test_weights_are_int8_per_channel_and_biases_int32(path):
    gq.export_onnx(attached(8), path, SHAPE)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert found['main.weight.codes'].dtype == np.int8 and found['main.weight.codes'].shape == (8, 8, 3, 3)
    assert found['main.weight.scale'].shape == (8,) and not found['main.weight.zero_point'].any()
    assert found['main.bias.codes'].dtype == np.int32
    steps = found['main.bias.scale'] / found['main.weight.scale']
    assert any(np.allclose(steps, array, rtol=1e-6) for name, array in found.items()
               if name.endswith('output_quantizer.scale'))


def test_batchnorm_is_gone_and_integer_weights_stay(path):
    net = attached(4)
    codes = net._children['main.weight_quantizer'].quantize(net.parameter(
        next(name for name, where in net.paths.items() if where == 'main.weight')).data()).asnumpy()
    gamma = net._reg_params['main_norm.gamma'].data().asnumpy()
    gq.export_onnx(net, path, SHAPE)
    model = gq.integer.read(path)
    assert not any(node.op == 'BatchNormalization' for node in model.nodes)
    signs = np.sign(gamma).astype(int).reshape(-1, 1, 1, 1)
    assert (gamma < 0).any() and np.array_equal(model.constants['main.weight.codes'], codes * signs)


@pytest.mark.parametrize('batch', [1, 5])
def test_the_batch_is_free(path, batch):
    gq.export_onnx(attached(8), path, (2, *SHAPE[1:]))
    assert run(path, images(batch)).shape == (batch, 10)


def test_only_standard_operators_and_a_plan_in_the_file(path):
    net = attached(4)
    gq.export_onnx(net, path, SHAPE)
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {''}
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [('', 13)]
    plan = json.loads({entry.key: entry.value for entry in proto.metadata_props}['gluonquant'])
    assert plan['target'] == 'onnxruntime'
    assert plan['quantizers']['main.weight_quantizer'] == {'method': 'lsq', 'bits': 4, 'role': 'weight', 'signed': True}


def test_shapes_of_all_tensors_are_known(path):
    gq.export_onnx(attached(8), path, SHAPE)
    proto = onnx.load(path)
    known = {info.name for info in [*proto.graph.value_info, *proto.graph.output]}
    assert {name for node in proto.graph.node for name in node.output} <= known


def test_four_bit_weights_can_be_stored_in_four_bits(path):
    net = attached(4)
    gq.export_onnx(net, path, SHAPE)
    expected = gq.integer.run(path, images())['output']
    gq.export_onnx(net, path, SHAPE, int4=True)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert types['main.weight.codes'] == onnx.TensorProto.INT4 and types['stem.weight.codes'] == onnx.TensorProto.INT8
    # Moving the lowest code of channels with negative factors changes them a little.
    assert np.corrcoef(gq.integer.run(path, images())['output'].ravel(), expected.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(run(path, images()), gq.integer.run(path, images())['output'], rtol=1e-4, atol=1e-4)


def test_outputs_may_be_chosen(path):
    net = attached(8)
    gq.export_onnx(net, path, SHAPE, outputs=['main'])
    model = gq.integer.read(path)
    assert list(model.outputs) == ['main'] and model.outputs['main'] == (None, 8, 8, 8)


def test_an_unknown_output_is_refused(path):
    with pytest.raises(ValueError, match="outputs names 'nothing', which is no node of the net"):
        gq.export_onnx(attached(8), path, SHAPE, outputs=['nothing'])


def test_an_unknown_target_is_refused_with_the_nearest(path):
    with pytest.raises(ValueError, match="unknown target 'onnxrutime'.*'onnxruntime'.*Known targets: onnxruntime, op"):
        gq.export_onnx(attached(8), path, SHAPE, 'onnxrutime')


class Ending(nn.HybridBlock):
    """A net that ends in an operator that ONNX does not have."""

    def __init__(self):
        super().__init__()
        self.body = float_net()

    def hybrid_forward(self, F, x):
        return F.sort(self.body(x))


def test_an_operator_without_counterpart_is_named_and_nothing_is_written(tmp_path):
    net = gq.attach(Ending(), 8, target='onnxruntime')
    gq.calibrate(net, [nd.array(images())])
    with pytest.raises(ValueError, match="sort 'sort0' cannot be exported: the standard operators of ONNX have no .*"
                                         r"outputs=\['body.out'\]"):
        gq.export_onnx(net, tmp_path / 'net.onnx', SHAPE)
    assert not list(tmp_path.iterdir())


def test_eight_bit_unsigned_codes_do_not_go_to_tensorrt(path):
    with pytest.raises(ValueError, match="codes, int8 of 8 bits, reach from 0 to 255, .*Attach with target='tensorrt'"):
        gq.export_onnx(attached(8, method='int8'), path, SHAPE, 'tensorrt')


def test_more_than_eight_bits_are_refused_with_the_layer(path):
    with pytest.raises(ValueError, match="read by 'main'.*lsq of 9 bits.*Quantize to at most 8 bits"):
        gq.export_onnx(attached(8, activation_bits=9), path, SHAPE)


def test_affine_weights_of_eight_bits_are_refused_with_the_layer(path):
    with pytest.raises(ValueError, match="Convolution '.*' cannot be exported: its weight codes, fqn of 8 bits, reach"):
        gq.export_onnx(attached(8, method='fqn'), path, SHAPE)


def test_input_shapes_must_name_the_inputs(path):
    with pytest.raises(ValueError, match='input_shape names image; the net reads data'):
        gq.export_onnx(attached(8), path, {'image': SHAPE})


def test_without_onnx_the_package_works_and_says_what_to_install(tmp_path):
    code = ('import sys; sys.modules.update(onnx=None, onnxruntime=None, openvino=None)\n'
            'import gluonquant as gq\n'
            'try:\n    gq.export_onnx(None, "x", (1,))\n'
            'except ImportError as error:\n    print(error)')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert "onnx is needed to write ONNX files" in out.stdout and "pip install 'gluonquant[deploy]'" in out.stdout


def test_an_existing_file_stays_when_writing_fails(path, monkeypatch):
    gq.export_onnx(attached(8), path, SHAPE)
    before = Path(path).read_bytes()
    monkeypatch.setattr('os.fsync', lambda file: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        gq.export_onnx(attached(4), path, SHAPE)
    assert Path(path).read_bytes() == before


def test_a_convolution_at_one_place_is_a_dense_layer_of_integers(path, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), nn.GlobalAvgPool2D(), nn.Conv2D(5, 1, use_bias=False), nn.Flatten())
    net.initialize()
    net(nd.array(images()))
    made = gq.attach(net, 8, method='int8', target='onnxruntime')
    gq.calibrate(made, [nd.array(images())])
    final = gq.export_onnx(made, path, SHAPE)
    assert optimized(path, tmp_path)['QGemm'] == 1
    assert np.array_equal(run(path, images()), gq.integer.run(path, images())['output'])
    gq.save_packed(final, tmp_path / 'net.gqp', SHAPE)
    assert np.array_equal(gq.integer.run(tmp_path / 'net.gqp', images())['output'], run(path, images()))
