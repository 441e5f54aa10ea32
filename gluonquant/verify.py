"""`verify`: whether what trains is what is deployed, rung by rung and tensor by tensor."""
import json
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from mxnet import autograd, nd

from .export.onnx_file import is_final, require
from .finalize import finalize
from .graph import inference_graph
from .integer import Runner
from .integer.operators import TABLE
from .integer.values import Mean, Products, Real
from .mxnet_int8 import codes as mxnet_codes
from .mxnet_int8 import to_mxnet_int8
from .registry import nearest
from .symbol_graph import QUANTIZE, Entry, evaluate

# Biases change when a net is finalized, by how much depends on bits: that rung is for information.
LEAST = {'trained': 0.0, 'final': 0.99, 'onnxruntime': 1.0, 'openvino': 0.95, 'mxnet': 0.95}


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


def verify(net, path, batches, runtimes=('onnxruntime',), least=None, inputs='data'):
    """Compare ways to compute an exported net with the integer runner, the definition of what is deployed.

    Parameters
    ----------
    net : HybridBlock or GraphNet
        What was exported; of a file with other ``outputs``, what these need. One that is not final is compared as it
        trains and as `finalize` makes it.
    path : str, of the file that `export_onnx` wrote
    batches : NDArray or float32 array, or an iterable of them
        Real data: what saturates or ties, does so on real data.
    runtimes : sequence of 'onnxruntime', 'openvino', 'mxnet'
        The last is `to_mxnet_int8`.
    least : dict, optional
        {rung: share of equal codes that it has to reach}, in place of ``LEAST``: 'trained' and 'final' are the
        fake-quantized net before and after `finalize`, the others runtimes. ONNX Runtime has to reach 1, or 0.99 if
        it computes convolutions in float because no quantizer follows them.
    inputs : str or sequence of str
        Names of the inputs of a converted net.

    Returns
    -------
    Report
        ``passed`` is for tests; ``print(report)`` shows a table; ``rungs`` has every tensor, ``outputs`` every output.

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
    runner = Runner(path)
    tensors = _tensors(path, runner.model)
    nets = {name: _cut(source, runner.model.outputs) for name, source in _gluon_rungs(net, inputs)}
    ways = {name: _Gluon(source, tensors) for name, source in nets.items()}
    ways.update((runtime, _RUNTIMES[runtime](path, runner.model, tensors, nets['final'])) for runtime in runtimes)
    least = {**LEAST, **({} if _all_integer(runner.model) else {'onnxruntime': LEAST['final']}), **(least or {})}
    rungs = {name: Rung(name, [], 0.0, None, least[name]) for name in ways}
    outputs = {name: [] for name in ('integer', *ways)}
    for batch in _batches(batches):
        watched = _Watched(runner.model)
        reference = runner(batch, keep='codes', watch=watched)
        expected = [reference[name] for name in runner.model.outputs]
        outputs['integer'].append(expected)
        for name, way in ways.items():
            codes, found = way(batch)
            outputs[name].append(found)
            rows = _compared(codes, reference, watched, snapped=name != 'trained')
            rungs[name] = _added(rungs[name], rows, found, expected)
    joined = {name: [np.concatenate(parts) for parts in zip(*every)] for name, every in outputs.items()}
    return Report([rung._replace(top1=_top1(joined[name][0], joined['integer'][0])) for name, rung in rungs.items()],
                  joined)


def _all_integer(model):
    """Whether every convolution has a quantizer behind it; ONNX Runtime computes others in float, and ties may fall."""
    readers = model.readers()
    return all(reader.op == 'QuantizeLinear' for node in model.nodes if node.op == 'Conv'
               for reader in readers[node.outputs[0]])


def _batches(given):
    for batch in [given] if hasattr(given, 'shape') else given:
        yield batch.asnumpy() if isinstance(batch, nd.NDArray) else np.asarray(batch, np.float32)


class _Watched:
    """What the integer runner has rounded, and where in the steps of its grid that lay."""

    def __init__(self, model):
        self.model, self.makers, self.values = model, model.maker(), {}

    def __call__(self, node, value, grid):
        self.values[node.outputs[0]] = value, grid

    def source(self, name):
        """(value, grid) behind the first quantizer on the way to the codes ``name``."""
        while name not in self.values:
            name = self.makers[name].inputs[0]
        return self.values[name]

    def places(self, name):
        """The exact numbers that became the codes ``name``, in units of codes: float64, not rounded, not clipped."""
        if name in self.values:
            value, grid = self.values[name]
            scale, zero = grid.like(value.array.ndim if hasattr(value, 'array') else value.exact().ndim)
            return value.exact() / scale.astype(np.float64) + zero
        node = self.makers[name]
        if node.op == 'Clip':
            return self.places(node.inputs[0])
        constants = self.model.constants
        inputs = [constants[other] if other in constants else Real(self.places(other))
                  for other in node.inputs if other]
        return TABLE[node.op](node.attrs, *inputs).real()


def _tensors(path, model):
    try:
        return json.loads(model.metadata['gluonquant'])['tensors']
    except (KeyError, ValueError, TypeError):
        raise ValueError(f'{path} does not say which tensors are quantized: it is no file of export_onnx') from None


def _gluon_rungs(net, inputs):
    if is_final(net):
        return [('final', net)]
    source = inference_graph(net, inputs)
    return [('trained', source), ('final', finalize(source))]


def _cut(net, outputs):
    """The net, or if the file returns other nodes of it, what returns these."""
    known = net.nodes_by_name()
    if len(outputs) == len(net.heads()) and not all(name in known for name in outputs):
        return net
    return net.returning([Entry(known[name]) for name in outputs if name in known])


class _Gluon:
    """The fake-quantized net. Ways to compute a net map a batch to ({name: codes as in the file}, [outputs])."""

    def __init__(self, net, tensors):
        self.net, self.tensors = net, tensors
        self.nodes = [*net.graph.nodes(), net.graph.heads]
        known = {node.name for node in self.nodes}
        for _, _, _, name in tensors:
            if name not in known:
                raise ValueError(f'the file has the tensor of {name!r}, the net does not: it was exported from another')

    def __call__(self, batch):
        net, codes, wanted = self.net, {}, {name for _, _, _, name in self.tensors}

        def run(F, node, arrays):
            out = net._run(F, node, arrays)
            if node.op == QUANTIZE and node.name in wanted:
                quantizer = net._children[node.attrs['quantizer']]
                if 'nudged' in quantizer._reg_params:       # values need not be whole numbers of steps
                    codes[node.name] = quantizer.quantize(arrays[0]).asnumpy()
                else:
                    scale, zero = (values[0] for values in quantizer.qparams())
                    codes[node.name] = np.rint(out.asnumpy() / scale).astype(np.int32) + zero
            return out
        values = {name: net.parameter(name).data() for name in net.paths}
        values[net.inputs[0]] = nd.array(batch)
        with autograd.pause():
            out = evaluate(nd, self.nodes, values, run)[net.graph.heads]
        return {name: codes[node] + shift for name, _, shift, node in self.tensors}, [one.asnumpy() for one in out]


class _OnnxRuntime:
    def __init__(self, path, model, tensors, net):
        ort = require('onnxruntime', 'to verify a file with it')
        onnx = require('onnx', 'to verify a file with ONNX Runtime')
        options = ort.SessionOptions()
        options.log_severity_level = 3
        proto = onnx.load(path)
        self.names = [name for name, *_ in tensors if name not in model.outputs]
        self.input = next(iter(model.inputs))
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.names)
        # The codes come from a copy of the graph with more outputs, the outputs from the file itself.
        self.codes, self.outputs = (ort.InferenceSession(source, options, providers=['CPUExecutionProvider'])
                                    for source in (proto.SerializeToString(), path))
        self.wanted = list(model.outputs)

    def __call__(self, batch):
        feed = {self.input: batch}
        return dict(zip(self.names, self.codes.run(self.names, feed))), self.outputs.run(self.wanted, feed)


class _OpenVino:
    def __init__(self, path, model, tensors, net):
        openvino = require('openvino', 'to verify a file with it')
        readers = model.readers()
        self.path, self.model, self.core, self.compiled = path, model, openvino.Core(), {}
        self.decoders = {name: node for name, *_ in tensors for node in readers[name] if node.op == 'DequantizeLinear'}

    def __call__(self, batch):
        reals = self._run(batch, [node.outputs[0] for node in self.decoders.values()])
        codes = {}
        for name, node in self.decoders.items():
            scale, zero = (self.model.constants[constant] for constant in node.inputs[1:3])
            codes[name] = np.rint(reals[node.outputs[0]] / scale).astype(np.int64) + int(zero)
        out = self._run(batch, [])
        return codes, [out[name] for name in self.model.outputs]

    def _run(self, batch, more):
        key = batch.shape, bool(more)
        if key not in self.compiled:        # for one shape: with a free batch, it rounds otherwise
            graph = self.core.read_model(self.path)
            for name in more:
                graph.add_outputs(name)
            graph.reshape({next(iter(self.model.inputs)): list(batch.shape)})
            self.compiled[key] = self.core.compile_model(graph, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return self.compiled[key]([batch])


class _MXNet:
    def __init__(self, path, model, tensors, net):
        self.block, self.tensors = to_mxnet_int8(net), tensors

    def __call__(self, batch):
        batch = nd.array(batch)
        codes, out = mxnet_codes(self.block, batch), self.block(batch)
        return ({name: codes[node] + shift for name, _, shift, node in self.tensors if node in codes},
                [one.asnumpy() for one in (out if isinstance(out, (list, tuple)) else [out])])


_RUNTIMES = {'onnxruntime': _OnnxRuntime, 'openvino': _OpenVino, 'mxnet': _MXNet}


def _compared(codes, reference, watched, snapped):
    """A `Tensor` for each of ``codes``. ``snapped``: whether they were computed with biases on their grid."""
    rows, seen = [], False
    for name, mine in codes.items():
        theirs = reference[name]
        mine = mine.reshape(theirs.shape)
        differs = mine != theirs
        count = int(np.count_nonzero(differs))
        largest = int(np.abs(mine[differs].astype(np.int64) - theirs[differs]).max(initial=0))
        cause = _cause(name, mine, theirs, watched, snapped) if count and not seen else ''
        seen |= bool(count)
        rows.append(Tensor(name, differs.size, count, largest, cause))
    return rows


def _added(rung, rows, outputs, expected):
    """``rung`` with what one more batch has shown."""
    before = rung.tensors or [row._replace(size=0, count=0, largest=0, cause='') for row in rows]
    tensors = [Tensor(old.name, old.size + new.size, old.count + new.count, max(old.largest, new.largest),
                      old.cause or new.cause) for old, new in zip(before, rows)]
    output = max(float(np.abs(mine.reshape(theirs.shape) - theirs).max(initial=0))
                 for mine, theirs in zip(outputs, expected))
    return rung._replace(tensors=tensors, output=max(rung.output, output))


def _top1(found, expected):
    if expected.ndim != 2 or expected.shape[1] < 2:
        return None
    return float((found.reshape(expected.shape).argmax(1) == expected.argmax(1)).mean())


def _cause(name, mine, theirs, watched, snapped):
    """The class of most differences in a tensor all of whose inputs are equal."""
    value, grid = watched.source(name)
    place = np.broadcast_to(watched.places(name), theirs.shape)[mine != theirs]
    low, high, info = theirs.min(), theirs.max(), np.iinfo(grid.dtype)

    def most(where):
        return np.mean(where) > 0.5
    if most((place < info.min - 0.5) | (place > info.max + 0.5)):
        return 'saturation'
    if most((place < low - 0.5) | (place > high + 0.5)):
        return 'clip'
    if isinstance(value, Mean):
        return 'average pooling'
    to_tie = np.abs(place - np.floor(place) - 0.5)
    if most(to_tie <= 4 * np.spacing(np.abs(place).astype(np.float32) + 1)):
        return 'rounding tie'
    if not snapped and isinstance(value, Products):
        return 'bias rounding'
    # A float32 sum of n products errs by up to n ulps of the largest partial sum; 1e-3 steps cover 10,000 of them.
    if most(to_tie <= 1e-3):
        return 'float accumulation order'
    return 'bias rounding' if isinstance(value, Products) else 'other arithmetic'
