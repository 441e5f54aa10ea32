"""Writing a `Model` as an ONNX file."""
from ..files import replacing
from ..finalize import finalize
from ..graph import GraphNet
from ..registry import nearest
from ..symbol_graph import BIAS
from .engines import ENGINES
from .lower import lower

_IR = {13: 8, 21: 10}


def export_onnx(net, path, input_shape, target='onnxruntime', *, inputs='data', outputs=None, int4=False,
                overflow='raise'):
    """Write a quantized net as an ONNX graph of QuantizeLinear and DequantizeLinear.

    Weights are stored as int8 codes with a scale per channel into which BatchNorm is absorbed, biases as int32 codes.
    All operators are of the standard domain. Codes of fewer than 8 bits lie in 8-bit containers and are clipped. The
    batch is free. The metadata entry ``gluonquant`` says how each tensor is quantized.

    Parameters
    ----------
    net : HybridBlock from `convert`, GraphNet from `attach`, or what `finalize` made of one
        One that is not final is finalized; its own outputs may then differ, by rounded biases, from what is written.
    path : str
    input_shape : tuple of int, or dict {input: tuple} for several inputs
        Including the batch, whose size does not matter.
    target : 'onnxruntime', 'openvino' or 'tensorrt'
        Quantize for the same target, with ``attach(..., target=...)``: each engine fuses another placement.
    inputs : str or sequence of str
        Names of the inputs of a converted net.
    outputs : sequence of str, optional
        Names of nodes to export, with what they need, in place of the net's outputs.
    int4 : bool
        Store weights of at most 4 bits as int4 (opset 21), half as large. Most engines compute such layers in float.
    overflow : see `finalize`

    Returns
    -------
    GraphNet, the finalized net: what it computes is what is deployed.

    Raises
    ------
    ImportError
        The package onnx is missing.
    ValueError
        A node that cannot be expressed is named, with its layer. Nothing is written then.
    RuntimeError
        See `finalize`.
    """
    onnx = require('onnx', 'to write ONNX files')
    if target not in ENGINES:
        raise ValueError(f'unknown target {target!r}.{nearest(target, ENGINES)} Known targets: '
                         f'{", ".join(sorted(ENGINES))}')
    final = final_net(net, inputs, overflow, int4)
    model = lower(final, input_shapes(final, input_shape), target, int4, outputs)
    write(onnx, model, path)
    return final


def require(package, purpose):
    """The module ``package``; ImportError says how to get it."""
    import importlib
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = 'openvino' if package == 'openvino' else 'deploy'
        raise ImportError(f"{package} is needed {purpose} and cannot be imported ({error}): "
                          f"pip install 'gluonquant[{extra}]'") from error


def is_final(net):
    """Whether ``net`` has come from `finalize`."""
    return isinstance(net, GraphNet) and any(node.op == BIAS for node in net.graph.nodes())


def final_net(net, inputs='data', overflow='raise', int4=False):
    """``net`` itself if it is final, else what `finalize` makes of it."""
    return net if is_final(net) else finalize(net, inputs=inputs, overflow=overflow, int4=int4)


def input_shapes(net, given):
    """{input: shape} from a shape or such a dict; ValueError unless that names the inputs of ``net``."""
    shapes = dict(given) if isinstance(given, dict) else {net.inputs[0]: tuple(given)}
    if sorted(shapes) != sorted(net.inputs):
        raise ValueError(f'input_shape names {", ".join(shapes)}; the net reads {", ".join(net.inputs)}')
    return {name: tuple(shape) for name, shape in shapes.items()}


def to_proto(onnx, model):
    """The onnx.ModelProto of a `Model`, checked, with the shapes of all tensors."""
    helper, types = onnx.helper, onnx.TensorProto
    four = {'int4': types.INT4, 'uint4': types.UINT4} if model.types else {}
    constants = [helper.make_tensor(name, four[model.types[name]], array.shape, array.reshape(-1))
                 if name in model.types else onnx.numpy_helper.from_array(array, name)
                 for name, array in model.constants.items()]

    def info(tensors):
        return [helper.make_tensor_value_info(name, types.FLOAT, ['N' if size is None else size for size in shape])
                for name, shape in tensors.items()]
    nodes = [helper.make_node(node.op, node.inputs, node.outputs, name=node.name, **node.attrs)
             for node in model.nodes]
    graph = helper.make_graph(nodes, 'gluonquant', info(model.inputs), info(model.outputs), constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid('', model.opset)], producer_name='gluonquant',
                              ir_version=_IR[model.opset])
    helper.set_model_props(proto, model.metadata)
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def write(onnx, model, path):
    """Write a `Model`; an existing file stays until the new one is complete."""
    proto = to_proto(onnx, model)
    with replacing(path) as file:
        file.write(proto.SerializeToString())
