"""Every classification net of both model zoos is exported, and ONNX Runtime computes what Gluon does.

Untrained deep nets amplify: where two orders of summation put a number on different sides of a rounding tie, one code
moves by one step, and twenty layers further all codes may differ. So nets are compared tensor by tensor, each one on
inputs that are equal: Gluon goes on with the codes of ONNX Runtime behind each quantizer.
"""
import gc
import json
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
import onnx
import onnxruntime
import pytest
from mxnet import nd

import gluonquant as gq
from gluonquant import integer
from gluonquant.graph import as_graph
from gluonquant.symbol_graph import QUANTIZE, evaluate, invoke
from zoo import ZOO, build, entry_id

BATCH = 3
# How far from a rounding tie, in steps, codes may differ. A float32 number of up to 255 steps, summed in another order,
# moves by 5e-5 in most nets and by 1.5e-4 in senet_154, the most that was seen.
TIE = 1e-3
# Float layers at the end, and DequantizeLinear, sum in another order in float32.
CLOSE = 1e-5
# What the outputs of a float net may differ by: random nets amplify 1e-7 in the first layers, senet_154 to 4e-3 in the
# outputs. An operator of another meaning makes a difference of 0.1 and more.
FLOAT = 2e-2
# Operators that ONNX Runtime computes in float32, with functions or in an order of its own: last bits differ, and if
# one falls on the other side of a tie, so do the codes behind them.
INEXACT = {'Softmax', 'Sigmoid', 'Resize', 'MatMul'}

FAST = ('gluon-mobilenet0.25', 'gluoncv-cifar_resnet20_v1', 'gluoncv-mobilenetv3_small', 'gluoncv-shufflenet_v1',
        'gluoncv-resnest14')
FAMILIES = FAST + (
    'gluon-resnet18_v2', 'gluon-alexnet', 'gluon-vgg11', 'gluon-vgg11_bn', 'gluon-resnet18_v1', 'gluoncv-resnet18_v1b',
    'gluoncv-resnet50_v1c', 'gluoncv-resnet50_v1d', 'gluoncv-resnet50_v1e', 'gluoncv-resnet50_v1s',
    'gluoncv-resnet18_v1b_0.89', 'gluoncv-resnext50_32x4d', 'gluoncv-se_resnet18_v1', 'gluoncv-se_resnet18_v2',
    'gluoncv-se_resnext50_32x4d', 'gluoncv-senet_154', 'gluon-densenet121', 'gluon-squeezenet1.0', 'gluon-inceptionv3',
    'gluoncv-googlenet', 'gluoncv-xception', 'gluon-mobilenetv2_0.25', 'gluoncv-mobilenetv3_large',
    'gluoncv-cifar_residualattentionnet56', 'gluoncv-nasnet_4_1056', 'gluoncv-shufflenet_v2', 'gluoncv-darknet53',
    'gluoncv-hrnet_w18_small_v1_c', 'gluoncv-resnest26', 'gluoncv-cifar_resnet20_v2', 'gluoncv-cifar_resnext29_32x4d',
    'gluoncv-cifar_wideresnet16_10', 'gluoncv-dla34')
ENTRIES = {entry_id(entry): entry for entry in ZOO}


def named(names, fast=()):
    return pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in fast else pytest.mark.slow)
                                            for name in names])


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')      # see test_zoo
    yield
    gc.collect()


def images(entry):
    return nd.array(np.random.RandomState(1).uniform(-1, 1, (BATCH, 3, entry.size, entry.size)))


def float_net(entry):
    """The net with random weights that keeps its signal: see `settle`."""
    mx.random.seed(0)
    np.random.seed(0)
    net = build(entry)
    net.initialize(mx.init.Xavier(), force_reinit=True)
    net(images(entry))
    settle(net, images(entry))
    return net


def settle(net, x):
    """Give each BatchNorm a random factor and the statistics of what x becomes in front of it.

    At 32 pixels many a channel is next to constant. Its variance is raised to the mean of all channels, or it would
    amplify rounding errors a hundred times. Some nets initialize factors with 0, which would silence whole branches.
    """
    graph, rng = as_graph(net), np.random.RandomState(2)

    def run(F, node, inputs):
        if node.op != 'BatchNorm':
            return invoke(F, node, inputs)
        channels = inputs[0].asnumpy().swapaxes(0, 1).reshape(inputs[0].shape[1], -1)
        variances = channels.var(1)
        made = [rng.uniform(0.5, 1.5, len(channels)), rng.normal(0, 0.1, len(channels)), channels.mean(1),
                np.maximum(variances, variances.mean())]
        made = [nd.array(array) for array in made]
        for entry, array in zip(node.inputs[1:], made):
            graph.parameter(entry.node.name).set_data(array)
        return invoke(F, node, [inputs[0], *made])
    evaluate(nd, graph.graph.nodes(), {**{name: graph.parameter(name).data() for name in graph.paths}, 'data': x}, run)


class Deployed(NamedTuple):
    """A finalized net and its file."""
    net: Any
    path: str
    model: integer.Model

    def tensors(self):
        """{node of a quantizer: (name of its tensor in the file, path of the quantizer, shift of the codes)}.

        OpenVINO and TensorRT get pooling and concatenation between real tensors: their shift is None.
        """
        found = json.loads(self.model.metadata['gluonquant'])['tensors']
        found = {node: (name, path, shift) for name, path, shift, node in found}
        for node in self.net.graph.nodes():
            name = self.net.label(node.inputs[0].node) if node.op == QUANTIZE else None
            if name in self.model.maker():
                found.setdefault(node.name, (name, node.attrs['quantizer'], None))
        return found


def deploy(net, entry, path, target='onnxruntime', **given):
    """`Deployed` from a quantized net, calibrated on one batch."""
    gq.calibrate(net, [images(entry)])
    final = gq.export_onnx(net, path, images(entry).shape, target, **given)
    return Deployed(final, path, integer.read(path))


def attached(entry, path, target='onnxruntime'):
    return deploy(gq.attach(float_net(entry), bits=8, method='int8', target=target), entry, path, target)


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def run_onnxruntime(made, x, codes=False):
    """{name: array} of the outputs, or of the outputs and all codes of activations."""
    proto = onnx.load(made.path)
    outputs = [info.name for info in proto.graph.output]
    if codes:
        names = dict.fromkeys(name for name, _, _ in made.tensors().values() if name not in outputs)
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        outputs += names
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return dict(zip(outputs, session.run(outputs, {'data': x.asnumpy()})))


def run_gluon(made, x, codes):
    """({name: (codes of the file, Gluon's, steps in front of rounding)}, outputs); Gluon goes on with the former."""
    net, known, seen = made.net, made.tensors(), {}

    def run(F, node, inputs):
        if node.op != QUANTIZE or known.get(node.name, ('',))[0] not in codes:
            return net._run(F, node, inputs)
        name, path, shift = known[node.name]
        quantizer, array = net._children[path], codes[name]
        scale, zero = (values[0] for values in quantizer.qparams())
        array = np.rint(array / scale) + zero if shift is None else array.astype(np.int64) - shift
        seen[name] = array, quantizer.quantize(inputs[0]).asnumpy(), inputs[0].asnumpy() / scale
        return nd.array((array - zero).astype(np.float32) * scale)
    values = {**{name: net.parameter(name).data() for name in net.paths}, 'data': x}
    return seen, evaluate(nd, [*net.graph.nodes(), net.graph.heads], values, run)[net.graph.heads]


def assert_onnxruntime_computes_what_gluon_does(made, x):
    """For equal codes in front of them, the float outputs are those of Gluon, too."""
    codes = run_onnxruntime(made, x, codes=True)
    for name, expected in zip(made.model.outputs, assert_tensors_agree(made, x, codes)):
        assert relative_error(codes[name], expected.asnumpy()) < CLOSE


def assert_tensors_agree(made, x, codes):
    """Codes differ next to rounding ties only, and by one. Returns Gluon's outputs."""
    tensors, outputs = run_gluon(made, x, codes)
    for name, (found, expected, steps) in tensors.items():
        assert np.abs(found - expected).max() <= 1, name
        # TensorRT's type saturates at -128 where a quantizer stops at -127.
        differ = (found != expected) & ~((found == -128) & (steps < -127))
        assert (np.abs(steps[differ] - np.floor(steps[differ]) - 0.5) < TIE).all(), name
    return outputs


def assert_batch_is_free(made, x):
    """One image alone gives what it gives among others."""
    alone, together = run_onnxruntime(made, x[:1]), run_onnxruntime(made, x)
    for name in made.model.outputs:
        assert relative_error(alone[name], together[name][:1]) < CLOSE


@named(ENTRIES, FAST)
def test_net_attached_for_onnxruntime_computes_the_same_there(name, tmp_path):
    entry = ENTRIES[name]
    made = attached(entry, str(tmp_path / 'net.onnx'))
    assert_onnxruntime_computes_what_gluon_does(made, images(entry))
    assert_batch_is_free(made, images(entry))


@named(FAMILIES, ('gluon-resnet18_v2', 'gluoncv-shufflenet_v1'))
def test_integer_runner_makes_the_codes_of_onnxruntime_bit_for_bit(name, tmp_path):
    entry = ENTRIES[name]
    made = attached(entry, str(tmp_path / 'net.onnx'))
    if INEXACT & {node.op for node in made.model.nodes}:
        pytest.skip('computes some operators in float')
    x = images(entry)
    found, expected = integer.Runner(made.model)(x.asnumpy(), keep='codes'), run_onnxruntime(made, x, codes=True)
    for tensor, array in expected.items():
        if tensor in made.model.outputs:        # a convolution without a quantizer behind it is computed in float
            assert relative_error(found[tensor], array) < CLOSE
        else:
            assert np.array_equal(found[tensor], array), tensor


@named(FAMILIES, ('gluon-mobilenet0.25', 'gluoncv-cifar_resnet20_v1'))
def test_converted_net_computes_the_same_in_onnxruntime(name, tmp_path):
    entry = ENTRIES[name]
    made = deploy(gq.convert(float_net(entry), 4), entry, str(tmp_path / 'net.onnx'))
    assert_onnxruntime_computes_what_gluon_does(made, images(entry))
    assert_batch_is_free(made, images(entry))


@pytest.mark.parametrize('target', ['openvino', 'tensorrt'])
@named(FAMILIES, ('gluon-mobilenet0.25', 'gluoncv-cifar_resnet20_v1'))
def test_graph_for_another_engine_computes_the_same(name, target, tmp_path):
    entry = ENTRIES[name]
    made = attached(entry, str(tmp_path / 'net.onnx'), target)
    assert_onnxruntime_computes_what_gluon_does(made, images(entry))
    assert_batch_is_free(made, images(entry))


@named(ENTRIES, FAST)
def test_float_net_is_written_as_it_computes(name, tmp_path):
    """Operators alone, which rounding would hide."""
    from gluonquant.export import lower
    from gluonquant.export.onnx_file import write
    entry = ENTRIES[name]
    net, x = float_net(entry), images(entry)
    path = str(tmp_path / 'net.onnx')
    graph = as_graph(net)
    write(onnx, lower(graph, {'data': x.shape}), path)
    made = Deployed(graph, path, integer.read(path))
    found, out = run_onnxruntime(made, x), graph(x)
    for tensor, expected in zip(made.model.outputs, out if isinstance(out, (list, tuple)) else [out]):
        assert relative_error(found[tensor], expected.asnumpy()) < FLOAT


SSD = ('ssd_512_mobilenet1.0_voc', 'ssd_300_vgg16_atrous_voc', 'ssd_512_resnet50_v1_voc')


def quantized_detector(name, x):
    """An SSD, all but the computation of boxes quantized."""
    from gluoncv.model_zoo import get_model
    mx.random.seed(0)
    np.random.seed(0)
    net = get_model(name, pretrained_base=False)
    net.initialize()
    for parameter in net.collect_params('.*weight').values():
        parameter.initialize(mx.init.Xavier(), force_reinit=True)
    for parameter in net.collect_params('.*(gamma|var)').values():
        parameter.initialize(mx.init.One(), force_reinit=True)
    net(x)
    settle(net, x)
    # concat0 and concat1 join the predictions of classes and of boxes, later ones anchors and results.
    net = gq.attach(net, bits=8, method='int8', target='onnxruntime', exclude=['concat[2-9]', 'concat[12]?'])
    gq.calibrate(net, [x])
    return net


@pytest.mark.slow
@pytest.mark.parametrize('name', SSD)
def test_detector_is_exported_up_to_its_predictions(name, tmp_path):
    x = nd.array(np.random.RandomState(1).uniform(-1, 1, (2, 3, 300, 300)))
    net, path = quantized_detector(name, x), str(tmp_path / 'net.onnx')
    with pytest.raises(ValueError, match=r"_greater_scalar 'multiperclassdecoder0.*cannot be exported.*outputs="):
        gq.export_onnx(net, path, x.shape)
    # Classes, boxes as offsets from the anchors, anchors: what the net returns in training.
    names = ['reshape6', 'reshape7', 'reshape8']
    made = Deployed(gq.export_onnx(net, path, x.shape, outputs=names), path, integer.read(path))
    codes = run_onnxruntime(made, x, codes=True)
    shapes = {label: codes[label].shape[1:] for label in names}
    assert shapes == {'reshape6': (shapes['reshape8'][0], 21), 'reshape7': shapes['reshape8'], 'reshape8': (
        shapes['reshape8'][0], 4)}
    assert_tensors_agree(made, x, codes)
    assert_batch_is_free(made, x)


def test_suppression_of_boxes_is_refused_by_name(tmp_path):
    from mxnet.gluon import nn

    class Detector(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.head = nn.Conv2D(6, 1, in_channels=3)

        def hybrid_forward(self, F, x):
            return F.contrib.box_nms(F.reshape(F.transpose(self.head(x), (0, 2, 3, 1)), (0, -1, 6)))
    net = Detector()
    net.initialize()
    x = nd.random.uniform(shape=(1, 3, 4, 4))
    net = gq.attach(net, bits=8, target='onnxruntime')
    gq.calibrate(net, [x])
    with pytest.raises(ValueError, match=r"_contrib_box_nms 'box_nms0' cannot be exported: .*outputs=\['reshape0'\]"):
        gq.export_onnx(net, str(tmp_path / 'net.onnx'), x.shape)
    gq.export_onnx(net, str(tmp_path / 'net.onnx'), x.shape, outputs=['reshape0'])
    assert integer.read(str(tmp_path / 'net.onnx')).outputs == {'reshape0': (None, 16, 6)}
