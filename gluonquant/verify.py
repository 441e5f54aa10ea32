"""`verify`: whether what trains is what is deployed, rung by rung and tensor by tensor."""
import json
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from mxnet import autograd, nd

from .export.onnx_file import is_final, require
from .finalize import finalize
from .graph import GraphNet, as_graph
from .integer import Runner
from .registry import nearest
from .symbol_graph import QUANTIZE, evaluate

# Biases change when a net is finalized, by how much depends on bits: that rung is for information.
LEAST = {'trained': 0.0, 'final': 0.99, 'onnxruntime': 1.0, 'openvino': 0.95}


class Tensor(NamedTuple):
    """One tensor of codes on two rungs.

    name : of the codes in the file.   size : number of codes.   count : how many differ.   largest : difference.
    cause : why, for the first tensor that differs, else ''.
    """
    name: str
    size: int
    count: int
    largest: int
    cause: str = ''

    @property
    def equal(self):
        """Share of equal codes, 0 to 1."""
        return 1 - self.count / max(self.size, 1)


class Rung(NamedTuple):
    """One way to compute the net, compared with the integer runner.

    tensors : list of Tensor, in the order in which they are computed.
    output : largest difference of the outputs.   top1 : share of equal arg max, None where the output is no list of
    classes.   least : share of equal codes that was asked for.
    """
    name: str
    tensors: List[Tensor]
    output: float
    top1: Optional[float]
    least: float

    @property
    def equal(self):
        """Share of equal codes over all tensors, 0 to 1."""
        return 1 - sum(tensor.count for tensor in self.tensors) / max(sum(tensor.size for tensor in self.tensors), 1)

    @property
    def first(self):
        """The name of the first tensor that differs, or None."""
        return next((tensor.name for tensor in self.tensors if tensor.count), None)

    @property
    def cause(self):
        """Of the differences in that tensor."""
        return next((tensor.cause for tensor in self.tensors if tensor.count), '')

    @property
    def passed(self):
        """Whether as many codes are equal as was asked for."""
        return self.equal >= self.least


class Report(NamedTuple):
    """What `verify` found; ``str`` makes a table of it."""
    rungs: List[Rung]
    outputs: Dict[str, Any]

    @property
    def passed(self):
        """Whether every rung agrees as far as was asked for."""
        return all(rung.passed for rung in self.rungs)

    def to_dict(self):
        """Plain values, for JSON."""
        return {'passed': self.passed, 'rungs': [
            {'name': rung.name, 'passed': rung.passed, 'equal': rung.equal, 'least': rung.least, 'top1': rung.top1,
             'output': rung.output, 'first': rung.first, 'cause': rung.cause,
             'tensors': [tensor._asdict() for tensor in rung.tensors]} for rung in self.rungs]}

    def __str__(self):
        lines = [f'{"against integers":18}{"equal codes":>12}{"lowest":>11}{"largest":>9}{"top-1":>9}  first to differ']
        for rung in self.rungs:
            largest = max((tensor.largest for tensor in rung.tensors), default=0)
            top1 = '' if rung.top1 is None else f'{rung.top1:.2%}'
            first = f'{rung.first} ({rung.cause})' if rung.first else 'none'
            state = 'passed' if rung.passed else f'FAILED, wants {rung.least:.2%}'
            lowest = min((tensor.equal for tensor in rung.tensors), default=1)
            lines.append(f'{rung.name:18}{rung.equal:>12.4%}{lowest:>11.3%}{largest:>9}{top1:>9}  {first}; {state}')
        return '\n'.join(lines)


def verify(net, path, batch, runtimes=('onnxruntime',), least=None, inputs='data'):
    """Compare ways to compute an exported net with the integer runner, the definition of what is deployed.

    Parameters
    ----------
    net : HybridBlock or GraphNet
        What was exported. One that is not final is compared as it trains and as `finalize` makes it.
    path : str, of the file that `export_onnx` wrote
    batch : NDArray or array, float32
        Real data: what saturates or ties, does so on real data.
    runtimes : sequence of 'onnxruntime', 'openvino'
    least : dict, optional
        {rung: share of equal codes that it has to reach}, in place of ``LEAST``: 'trained' and 'final' are the
        fake-quantized net before and after `finalize`, the others runtimes.

    Returns
    -------
    Report
        ``passed`` is for tests; ``print(report)`` shows a table; ``rungs`` has every tensor.

    Raises
    ------
    ValueError
        An unknown runtime; a file that is not of `export_onnx`, or of another net.
    ImportError
        A runtime is not installed.
    """
    for runtime in runtimes:
        if runtime not in _RUNTIMES:
            raise ValueError(f'unknown runtime {runtime!r}.{nearest(runtime, _RUNTIMES)} Known: '
                             f'{", ".join(_RUNTIMES)}')
    least = {**LEAST, **(least or {})}
    batch = batch.asnumpy() if isinstance(batch, nd.NDArray) else np.asarray(batch, np.float32)
    runner = Runner(path)
    tensors = _tensors(path, runner.model)
    watched = _Watched()
    reference = runner(batch, keep='codes', watch=watched)
    rungs, outputs = [], {'integer': _outputs(runner.model, reference)}
    for name, source in _gluon_rungs(net, inputs):
        codes, outputs[name] = _gluon(source, batch, tensors)
        rungs.append(_compare(name, codes, reference, watched, outputs[name], outputs['integer'], least[name]))
    for runtime in runtimes:
        codes, outputs[runtime] = _RUNTIMES[runtime](path, runner.model, tensors, batch)
        rungs.append(_compare(runtime, codes, reference, watched, outputs[runtime], outputs['integer'],
                              least[runtime]))
    return Report(rungs, outputs)


class _Watched(dict):
    """{name of codes: (value that was rounded, grid)}."""

    def __call__(self, node, value, grid):
        self[node.outputs[0]] = value, grid


def _tensors(path, model):
    try:
        return json.loads(model.metadata['gluonquant'])['tensors']
    except (KeyError, ValueError, TypeError):
        raise ValueError(f'{path} does not say which tensors are quantized: it is no file of export_onnx') from None


def _outputs(model, values):
    return [values[name] for name in model.outputs]


def _gluon_rungs(net, inputs):
    if is_final(net):
        return [('final', net)]
    source = net if isinstance(net, GraphNet) else as_graph(net, inputs=inputs)
    return [('trained', source), ('final', finalize(source))]


def _gluon(net, batch, tensors):
    """({name: codes in the file's container}, outputs) of the fake-quantized net."""
    inputs = {}

    def run(F, node, arrays):
        if node.op == QUANTIZE and node.name in wanted:
            inputs[node.name] = net._children[node.attrs['quantizer']].quantize(arrays[0]).asnumpy()
        return net._run(F, node, arrays)
    wanted = {node for _, _, _, node in tensors}
    values = {name: net.parameter(name).data() for name in net.paths}
    values[net.inputs[0]] = nd.array(batch)
    with autograd.pause():
        out = evaluate(nd, [*net.graph.nodes(), net.graph.heads], values, run)[net.graph.heads]
    missing = wanted - set(inputs)
    if missing:
        raise ValueError(f'the file has the tensor of {min(missing)!r}, the net does not: it was exported from another')
    return ({name: inputs[node] + shift for name, _, shift, node in tensors}, [array.asnumpy() for array in out])


def _onnxruntime(path, model, tensors, batch):
    ort = require('onnxruntime', 'to verify a file with it')
    onnx = require('onnx', 'to verify a file with ONNX Runtime')
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = onnx.load(path)
    names = [name for name, *_ in tensors if name not in model.outputs]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    feed = {next(iter(model.inputs)): batch}
    # The codes come from a copy of the graph with more outputs, the outputs from the file itself.
    codes, out = (ort.InferenceSession(source, options, providers=['CPUExecutionProvider']).run(wanted, feed)
                  for source, wanted in ((proto.SerializeToString(), names), (path, list(model.outputs))))
    return dict(zip(names, codes)), out


def _openvino(path, model, tensors, batch):
    openvino = require('openvino', 'to verify a file with it')
    readers, found = model.readers(), {}
    for name, *_ in tensors:
        for node in readers[name]:
            if node.op == 'DequantizeLinear':
                found[name] = node
    core, settings = openvino.Core(), {'INFERENCE_PRECISION_HINT': 'f32'}

    def compiled(names):
        graph = core.read_model(path)
        for name in names:
            graph.add_outputs(name)
        graph.reshape({next(iter(model.inputs)): list(batch.shape)})
        return core.compile_model(graph, 'CPU', settings)([batch])
    reals = compiled([node.outputs[0] for node in found.values()])
    out = compiled([])
    codes = {}
    for name, node in found.items():
        scale, zero = (model.constants[constant] for constant in node.inputs[1:3])
        codes[name] = np.rint(reals[node.outputs[0]] / scale).astype(np.int64) + int(zero)
    return codes, [out[name] for name in model.outputs]


_RUNTIMES = {'onnxruntime': _onnxruntime, 'openvino': _openvino}


def _compare(name, codes, reference, watched, outputs, expected, least):
    rows, seen = [], False
    for tensor, mine in codes.items():
        theirs = reference[tensor].astype(np.int64)
        difference = np.abs(mine.astype(np.int64).reshape(theirs.shape) - theirs)
        count = int(np.count_nonzero(difference))
        cause = _cause(tensor, mine, theirs, watched) if count and not seen else ''
        seen |= bool(count)
        rows.append(Tensor(tensor, difference.size, count, int(difference.max(initial=0)), cause))
    output = max(float(np.abs(mine.reshape(theirs.shape) - theirs).max(initial=0))
                 for mine, theirs in zip(outputs, expected))
    return Rung(name, rows, output, _top1(outputs, expected), least)


def _top1(outputs, expected):
    if expected[0].ndim != 2 or expected[0].shape[1] < 2:
        return None
    return float((outputs[0].reshape(expected[0].shape).argmax(1) == expected[0].argmax(1)).mean())


def _cause(tensor, mine, theirs, watched):
    """The class of most differences in a tensor all of whose inputs are equal."""
    if tensor not in watched and tensor.replace('.codes', '.unclipped') not in watched:
        return 'inputs differ'
    value, grid = watched.get(tensor) or watched[tensor.replace('.codes', '.unclipped')]
    differs = mine.reshape(theirs.shape) != theirs
    low, high = theirs.min(), theirs.max()
    scale, zero = grid.like(theirs.ndim)
    place = (value.exact() / scale.astype(np.float64) + zero)
    place = np.broadcast_to(place, theirs.shape)[differs]
    info = np.iinfo(grid.dtype)
    if ((place < info.min) | (place > info.max)).mean() > 0.5:
        return 'saturation'
    if ((place < low - 0.5) | (place > high + 0.5)).mean() > 0.5:
        return 'clip'
    if type(value).__name__ == 'Mean':
        return 'average pooling'
    to_tie = np.abs(place - np.floor(place) - 0.5)
    ulp = np.spacing(np.abs(place).astype(np.float32) + 1)
    if (to_tie <= 4 * ulp).mean() > 0.5:
        return 'rounding tie'
    # A float32 sum of n products errs by up to n ulps of the largest partial sum; 1e-3 steps cover 10,000 of them.
    if (to_tie <= 1e-3).mean() > 0.5:
        return 'float accumulation order'
    return 'bias rounding' if type(value).__name__ == 'Products' else 'other arithmetic'
