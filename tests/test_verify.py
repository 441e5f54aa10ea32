"""`verify`: the ladder from what trains to what is deployed."""
import json

import numpy as np
import onnx
import pytest
from mxnet import nd

import gluonquant as gq
from deploy_nets import SHAPE, attached, converted, images
from gluonquant.integer import Model, Node, Runner
from gluonquant.integer.values import Grid, Mean, Products, Real
from gluonquant.verify import _cause, _Watched


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.onnx')


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_all_rungs_of_a_final_net_agree(path, bits):
    final = gq.export_onnx(attached(bits), path, SHAPE)
    report = gq.verify(final, path, nd.array(images()), ['onnxruntime', 'openvino'])
    assert report.passed
    assert [rung.name for rung in report.rungs] == ['final', 'onnxruntime', 'openvino']
    assert report.rungs[1].equal == 1 and report.rungs[1].first is None and report.rungs[1].top1 == 1


def test_the_rung_before_finalizing_shows_what_rounded_biases_change(path):
    net = attached(4)
    gq.export_onnx(net, path, SHAPE)
    trained, final, _ = gq.verify(net, path, images(32)).rungs
    assert (trained.name, final.name) == ('trained', 'final')
    assert trained.equal < final.equal and trained.cause == 'bias rounding'


def test_a_converted_net_can_be_verified(path):
    net = converted(4)
    gq.export_onnx(net, path, SHAPE)
    report = gq.verify(net, path, images())
    assert report.passed and report.rungs[-1].least == 0.99


def test_batches_add_up(path):
    final = gq.export_onnx(attached(8), path, SHAPE)
    whole = gq.verify(final, path, images(8)).rungs[0]
    parts = gq.verify(final, path, [images(8)[:3], images(8)[3:]])
    assert [row[:3] for row in parts.rungs[0].tensors] == [row[:3] for row in whole.tensors]
    assert parts.outputs['integer'][0].shape == (8, 10)


def alter(path, name, change):
    """Change a constant in an ONNX file."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
    onnx.save(proto, path)


def test_an_altered_weight_is_found_in_the_first_tensor_that_it_changes(path):
    final = gq.export_onnx(attached(8), path, SHAPE)
    alter(path, 'main.weight.codes', lambda codes: np.where(np.arange(8).reshape(-1, 1, 1, 1) == 2, codes // 2, codes
                                                            ).astype(codes.dtype))
    report = gq.verify(final, path, images())
    assert not report.passed
    assert report.rungs[0].first == 'main_norm_fwd.codes' or report.rungs[0].first.startswith('main')
    assert 'FAILED' in str(report)


def test_thresholds_decide(path):
    net = attached(4)
    gq.export_onnx(net, path, SHAPE)
    assert gq.verify(net, path, images(), least={'trained': 0.1}).passed
    assert not gq.verify(net, path, images(), least={'trained': 1.0}).passed


def test_the_report_is_a_table_and_data(path):
    final = gq.export_onnx(attached(8), path, SHAPE)
    report = gq.verify(final, path, images())
    assert [line.split()[0] for line in str(report).splitlines()] == ['against', 'final', 'onnxruntime']
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain['passed'] and plain['rungs'][1]['tensors'][0]['name'] == 'data.codes'


def test_an_unknown_runtime_is_refused(path):
    final = gq.export_onnx(attached(8), path, SHAPE)
    with pytest.raises(ValueError, match="unknown runtime 'onnx'.*onnxruntime"):
        gq.verify(final, path, images(), ['onnx'])


def test_a_file_of_another_net_is_refused(path):
    gq.export_onnx(attached(8), path, SHAPE)
    other = gq.finalize(converted(8))
    with pytest.raises(ValueError, match='it was exported from another'):
        gq.verify(other, path, images())


def test_a_file_that_is_not_ours_is_refused(path):
    final = gq.export_onnx(attached(8), path, SHAPE)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(ValueError, match='is no file of export_onnx'):
        gq.verify(final, path, images())


GRID = Grid(np.float32(0.5), np.uint8(128), np.dtype('uint8'))


def watched(value):
    found = _Watched(Model([], {}, {}, {}))
    found(Node('QuantizeLinear', [], ['x.codes']), value, GRID)
    return found


@pytest.mark.parametrize('value, mine, snapped, cause', [
    (Real(np.float32([0.25, 3])), [129, 134], True, 'rounding tie'),
    (Real(np.float32([0.2499, 3])), [129, 134], True, 'float accumulation order'),
    (Real(np.float32([0.3, 3])), [128, 134], True, 'other arithmetic'),
    (Products(np.int32([[30], [3]]), np.float32(0.01)), [[128], [128]], False, 'bias rounding'),
    (Mean(np.int32([31, 3]), np.float32(0.01), 1), [128, 128], True, 'average pooling'),
    (Real(np.float32([900, 3])), [254, 134], True, 'saturation')])
def test_causes(value, mine, snapped, cause):
    theirs = value.codes(GRID).astype(np.int64)
    assert _cause('x.codes', np.array(mine), theirs, watched(value), snapped) == cause


def test_a_difference_at_the_end_of_a_clipped_range_is_a_clip():
    value = Real(np.float32([30, 3, -30]))
    assert _cause('x.codes', np.array([140, 134, 120]), np.array([136, 134, 120]), watched(value), True) == 'clip'


def test_the_runner_tells_what_is_rounded(path):
    gq.export_onnx(attached(8), path, SHAPE)
    seen = []
    Runner(path)(images(), watch=lambda node, value, grid: seen.append((node.outputs[0], type(value).__name__)))
    assert seen[0] == ('data.codes', 'Real') and 'Products' in {kind for _, kind in seen}
