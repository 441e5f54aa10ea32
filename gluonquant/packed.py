"""`save_packed` and `load_packed`: a net for deployment in one small file. `integer.packed_file` has the format."""
import json

import numpy as np
from mxnet import nd

from .export.engines import ENGINES
from .export.lower import Lowering
from .export.onnx_file import final_net, input_shapes
from .files import replacing
from .graph import GraphNet
from .integer.packed_file import content, read_packed
from .registry import nearest
from .symbol_graph import QUANTIZE


def save_packed(net, path, input_shape, *, target='onnxruntime', architecture='', inputs='data', overflow='raise'):
    """Write a quantized net with its weights at their own width: at 4 bits, near an eighth of the float file.

    The file has all that inference needs: the graph, codes and scales of weights, biases, ranges, and the plan.
    `load_packed` makes a net of it, ``gluonquant.integer.read`` a model that runs without MXNet. To train on, use
    `save`: what a method has learned about a weight, other than its codes, is not in the file.

    Parameters
    ----------
    net, input_shape, target, inputs, overflow : as for `export_onnx`
    path : str
    architecture : str
        What the net is called, for people.

    Returns
    -------
    GraphNet, the finalized net, with the outputs that `load_packed` restores.

    Raises
    ------
    ValueError, RuntimeError
        As `export_onnx`.
    """
    if target not in ENGINES:
        raise ValueError(f'unknown target {target!r}.{nearest(target, ENGINES)} Known targets: '
                         f'{", ".join(sorted(ENGINES))}')
    final = final_net(net, inputs, overflow)
    lowering = Lowering(final, input_shapes(final, input_shape), ENGINES[target])
    model = lowering.model()
    arrays, weights = {}, {}
    for node in final.graph.nodes():
        if node.op == QUANTIZE and json.loads(node.attrs['spec'])['role'] == 'weight':
            _add_weight(final, node, arrays, weights)
    gluon = _describe(final, weights, arrays)
    constants = {name: {'weight': lowering.weights[name], 'shape': array.shape} if name in lowering.weights
                 else _add(arrays, f'm:{name}', array) for name, array in model.constants.items()}
    header = {'architecture': architecture, 'weights': weights, 'gluon': gluon, 'model': {
        'nodes': [vars(node) for node in model.nodes], 'inputs': model.inputs, 'outputs': model.outputs,
        'opset': model.opset, 'metadata': model.metadata, 'constants': constants}}
    with replacing(path) as file:
        file.write(content(header, arrays))
    return final


def _add(arrays, name, array, bits=None):
    arrays[name] = array, bits
    return name


def _add_weight(net, node, arrays, weights):
    """Describe the weight in front of the quantizer ``node``."""
    path = node.attrs['quantizer']
    if path in weights:
        return
    quantizer = net._children[path]
    if quantizer.grid is None:
        return
    weight, grid = net.compute(node.inputs[0]), quantizer.grid
    scale, zero = quantizer.qparams(weight)
    step = 2 if grid.midrise else 1
    numbers = (quantizer.quantize(weight).asnumpy() - grid.qmin) // step
    readers = net.graph.readers(node)
    factor = readers[0].inputs[1].node.name if readers[0].op == 'broadcast_mul' else None
    weights[path] = {
        'codes': _add(arrays, f'w:{path}', numbers.astype(np.uint8), grid.bits), 'step': step, 'base': grid.qmin,
        'scale': _add(arrays, f's:{path}', scale), 'zero': _add(arrays, f'z:{path}', zero),
        'axis': quantizer.axis if quantizer.per_channel else 0,
        'factor': None if factor is None else f'p:{net.paths[factor]}'}


def _describe(net, weights, arrays):
    """The net, its quantizers of weights in the form of `FixedWeight`, and the arrays of all else."""
    described = net.describe()
    graph = json.loads(described['graph'])
    packed = set()
    for node in graph['nodes']:
        path = node['attrs'].get('quantizer')
        if node['op'] == QUANTIZE and path in weights:
            grid = net._children[path].grid
            spec = {**json.loads(node['attrs']['spec']), 'method': 'fixed', 'bits': grid.bits, 'signed': None,
                    'per_channel': arrays[weights[path]['scale']][0].size > 1, 'options': {'midrise': grid.midrise}}
            node['attrs']['spec'] = json.dumps(spec)
            packed.add(graph['nodes'][node['inputs'][0][0]]['name'])
    described['graph'] = json.dumps(graph)
    for name, path in net.paths.items():
        if name not in packed:
            _add(arrays, f'p:{path}', net.parameter(name)._reduce().asnumpy())
    states = {}
    for path, quantizer in net._children.items():
        if path not in weights:
            for name in quantizer._reg_params:
                states.setdefault(path, {})[name] = _add(arrays, f'q:{path}.{name}', quantizer.value(name))
    sources = {path: _source(net, path) for path in weights}
    return {'net': described, 'states': states, 'sources': sources}


def _source(net, path):
    """The path of the Parameter in front of a weight's quantizer."""
    node = next(node for node in net.graph.nodes() if node.op == QUANTIZE and node.attrs['quantizer'] == path)
    source = node.inputs[0].node
    if source.name not in net.paths:
        raise ValueError(f'{path}: its weight is computed ({source.op} {net.label(source)!r}), packed files hold '
                         'Parameters')
    return net.paths[source.name]


def load_packed(path, ctx=None):
    """The net in a file of `save_packed`, a `GraphNet`: the same outputs, bit for bit.

    Parameters
    ----------
    path : str
    ctx : Context or list of Context, optional; default cpu.

    Raises
    ------
    ValueError
        The file is cut off, altered, of another version, or no packed file.
    """
    packed = read_packed(path)
    about = packed.header['gluon']
    net = GraphNet.from_description(about['net'])
    values = {name[2:]: array for name, array in packed.arrays.items() if name.startswith('p:')}
    for quantizer, parameter in about['sources'].items():
        codes, scale, _ = packed.weight(quantizer)
        shape = [1] * codes.ndim
        shape[packed.header['weights'][quantizer]['axis']] = -1
        values[parameter] = codes.astype(np.float32) * scale.reshape(shape)
    for name, parameter in net._collect_params_with_prefix().items():
        if name in values:
            parameter._load_init(nd.array(values[name], dtype=values[name].dtype), ctx)
    for quantizer, states in about['states'].items():
        net._children[quantizer].write(**{name: packed.arrays[array] for name, array in states.items()})
    for quantizer in about['sources']:
        net._children[quantizer].write(scale=packed.arrays[packed.header['weights'][quantizer]['scale']],
                                       initialized=1.0)
    for parameter in net.collect_params().values():
        if ctx is not None:
            parameter.reset_ctx(ctx)
    return net
