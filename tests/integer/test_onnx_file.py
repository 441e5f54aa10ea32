"""Reading ONNX files without the onnx package."""
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gluonquant as gq
from deploy_nets import SHAPE, attached
from gluonquant.integer.onnx_file import read_onnx


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.onnx')


def save(path, nodes, constants=(), domains=('',), **changes):
    """A file of these nodes, from x to y."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['N', 3]) for name in ('x', 'y')]
    graph = helper.make_graph(nodes, 'graph', info[:1], info[1:], list(constants))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 13) for domain in domains], **changes)
    onnx.save(proto, path)
    return path


IDENTITY = [helper.make_node('Identity', ['x'], ['y'], name='id')]


@pytest.mark.parametrize('int4', [False, True])
def test_everything_that_onnx_reads_is_read(path, int4):
    gq.export_onnx(attached(4), path, SHAPE, int4=int4)
    proto, model = onnx.load(path), read_onnx(path)
    assert [(node.op, node.name, node.inputs, node.outputs) for node in model.nodes] == [
        (node.op_type, node.name, list(node.input), list(node.output)) for node in proto.graph.node]
    for mine, theirs in zip(model.nodes, proto.graph.node):
        attrs = {attribute.name: helper.get_attribute_value(attribute) for attribute in theirs.attribute}
        assert mine.attrs == {name: value.decode() if isinstance(value, bytes) else value
                              for name, value in attrs.items()}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert constants.keys() == model.constants.keys()
    for name, array in constants.items():
        assert np.array_equal(array.astype(np.float64), model.constants[name].astype(np.float64)), name
    assert model.metadata == {entry.key: entry.value for entry in proto.metadata_props}
    assert model.inputs == {'data': (None, *SHAPE[1:])} and model.outputs == {'output': (None, 10)}


@pytest.mark.parametrize('kind, values', [
    (TensorProto.FLOAT, [1.5, -2, 3e-40]), (TensorProto.INT32, [-1, 2 ** 31 - 1, -2 ** 31]),
    (TensorProto.INT8, [-128, 0, 127]), (TensorProto.UINT8, [0, 255, 3]), (TensorProto.INT64, [-2 ** 63, 5, 2 ** 62])])
@pytest.mark.parametrize('raw', [False, True])
def test_constants_in_either_form(path, kind, values, raw):
    tensor = helper.make_tensor('c', kind, [3], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), 'c')
    save(path, IDENTITY, [tensor])
    assert np.array_equal(read_onnx(path).constants['c'], numpy_helper.to_array(tensor))


def test_attributes_of_every_kind(path):
    attrs = {'f': 1.5, 'i': -7, 's': 'text', 'floats': [1.0, -2.5], 'ints': [1, -1, 2 ** 40],
             't': numpy_helper.from_array(np.arange(3, dtype=np.int64), 'value')}
    save(path, [helper.make_node('Identity', ['x'], ['y'], name='id', **attrs)])
    found = read_onnx(path).nodes[0].attrs
    assert {name: found[name] for name in ('f', 'i', 's', 'floats', 'ints')} == {
        name: attrs[name] for name in ('f', 'i', 's', 'floats', 'ints')}
    assert np.array_equal(found['t'], np.arange(3))


def test_another_domain_is_refused_with_the_node(path):
    save(path, [helper.make_node('QLinearAdd', ['x'], ['y'], name='sum', domain='com.microsoft')],
         domains=('', 'com.microsoft'))
    with pytest.raises(ValueError, match="node 'sum' is com.microsoft.QLinearAdd: only operators of the standard ONNX"):
        read_onnx(path)


def test_control_flow_is_refused(path):
    body = helper.make_graph([], 'body', [], [])
    save(path, [helper.make_node('If', ['x'], ['y'], name='if', then_branch=body, else_branch=body)])
    with pytest.raises(ValueError, match="attribute '.*_branch' is a graph"):
        read_onnx(path)


def test_weights_in_another_file_are_refused(path, tmp_path):
    tensor = numpy_helper.from_array(np.zeros(1000, np.float32), 'big')
    save(path, IDENTITY, [tensor])
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location='weights', size_threshold=0)
    with pytest.raises(ValueError, match="tensor 'big' lies in another file"):
        read_onnx(path)


def test_an_unusual_type_is_refused(path):
    save(path, IDENTITY, [numpy_helper.from_array(np.zeros(3, np.complex64), 'c')])
    with pytest.raises(ValueError, match="tensor 'c' has elements of type 14"):
        read_onnx(path)


@pytest.mark.parametrize('content', [b'', b'\x00', b'not an ONNX file at all', b'\xff' * 100])
def test_what_is_no_onnx_file_is_refused(path, content):
    with open(path, 'wb') as file:
        file.write(content)
    with pytest.raises(ValueError, match='no complete ONNX file|no ONNX file'):
        read_onnx(path)


def test_a_file_that_is_cut_off_is_refused(path):
    gq.export_onnx(attached(8), path, SHAPE)
    with open(path, 'rb') as file:
        content = file.read()
    for size in range(1, len(content) - 1, 997):
        with open(path, 'wb') as file:
            file.write(content[:size])
        with pytest.raises(ValueError, match=path):
            read_onnx(path)


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        gq.integer.read(path)
