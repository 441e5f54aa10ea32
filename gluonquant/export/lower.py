"""From the graph of a finalized net to a `Model` of ONNX operators."""
import json

import numpy as np

from .. import integer
from ..finalize import weight_of
from ..integer.constants import absorb, bias_codes
from ..symbol_graph import BIAS, QUANTIZE, VARIABLE, Entry, ancestors, numbered
from .engines import ENGINES
from .operators import WRITERS
from .stem import deepen
from .values import Clamped, Codes, Moved, Real

FORMAT = 1


def lower(net, shapes, target='onnxruntime', int4=False, outputs=None, opset=None):
    """The `integer.Model` of a net from `finalize`.

    Parameters
    ----------
    net : GraphNet
    shapes : dict, {input: shape}; the first size of each is the batch, which stays free.
    target, int4, outputs
        See `export_onnx`.

    Raises
    ------
    ValueError
        An operator, or a quantizer, that cannot be expressed; the node and its layer are named.
    """
    engine = ENGINES[target]
    model = Lowering(net, shapes, engine, int4, opset).model(outputs)
    return deepen(model) if engine.deep_stem else model


class Lowering:
    """Writes a graph node by node.

    Attributes, for the writers of operators
    ----------
    net : GraphNet
    shapes : dict, {(node, index): shape}; 0 where a size is that of the batch.
    ranges : dict, {tensor: Grid} where quantizers do not stand in the graph
    weights : dict, {constant that holds codes of a weight: path of its quantizer}
    """

    def __init__(self, net, shapes, engine, int4=False, opset=None):
        self.net, self.engine, self.int4 = net, engine, int4
        self.opset = opset or (21 if int4 else 13)
        self.shapes = _free_batch(net.graph, shapes, {name: tuple(net.parameter(name).shape) for name in net.paths})
        self.made = integer.Model([], {}, {}, {}, self.opset)
        self.values, self.tensors, self.weights, self.ranges = {}, [], {}, {}
        self._names, self._written = set(), {}
        self._constants = _constants(net)

    def model(self, outputs=None):
        """The `integer.Model` of the graph, or of what ``outputs``, labels of nodes, need."""
        heads = self._heads(outputs)
        for name in self.net.inputs:
            self.made.inputs[self.free(name)] = self._shape(Entry(self.net.graph.variables()[name]))
        for node in ancestors([entry for _, entry in heads]):
            self._visit(node)
        for name, entry in heads:
            source = self.real(self.values[entry.node, entry.index])
            self.write('Identity', [source], name)
            self.made.outputs[name] = self._shape(entry)
        _drop_unread(self.made)
        _skip_identities(self.made)
        self.made.metadata = self._metadata()
        return self.made

    def _heads(self, outputs):
        heads = [(f'output{number}' if number else 'output', entry)
                 for number, entry in enumerate(self.net.graph.heads.inputs)]
        if outputs is not None:
            known = self.net.nodes_by_name()
            for name in outputs:
                if name not in known:
                    raise ValueError(f'outputs names {name!r}, which is no node of the net. See gq.explain for names')
            heads = [(name, Entry(known[name])) for name in outputs]
        for name, _ in heads:
            self._names.add(name)
        return heads

    def _shape(self, entry):
        return tuple(size or None for size in self.shapes[entry.node, entry.index])

    def _visit(self, node):
        if node.op == VARIABLE:
            if node.name in self.net.inputs:
                self.values[node, 0] = Real(node.name)
            return
        if node.op == BIAS or self.constant_input(Entry(node)):
            return                      # written with what reads it
        if node.op == QUANTIZE:
            self.values[node, 0] = self._quantized(node)
            return
        writer = WRITERS.get(node.op)
        if writer is None:
            raise self.refused(node, 'the standard operators of ONNX have no counterpart')
        made = writer(self, node)
        for index, value in enumerate(made if isinstance(made, list) else [made]):
            self.values[node, index] = value

    # What writers of operators use

    def refused(self, node, reason):
        """The ValueError for a node that cannot be exported."""
        return ValueError(f'{node.op} {self.net.label(node)!r} cannot be exported: {reason}. Export what comes before '
                          f'with outputs={self._frontier(node)}, and compute the rest outside')

    def _frontier(self, refused):
        """Labels of the last nodes that can be exported, as a list in a message."""
        beyond, found = {refused}, []
        for node in self.net.graph.nodes():
            known = node.op in WRITERS or node.op in (QUANTIZE, BIAS, VARIABLE) or self.constant_input(Entry(node))
            if not known or any(entry.node in beyond for entry in node.inputs):
                beyond.add(node)
        for node in self.net.graph.nodes():
            if node in beyond:
                for entry in node.inputs:
                    source = entry.node.inputs[0].node if entry.node.op == QUANTIZE else entry.node
                    if source not in beyond and source.op != VARIABLE and not self.constant_input(Entry(source)):
                        found.append(self.net.label(source))
        return list(dict.fromkeys(found))

    def free(self, name):
        """``name``, or ``name_2`` and so on if that is taken."""
        free = next(other for other in numbered(name) if other not in self._names)
        self._names.add(free)
        return free

    def name(self, node):
        """A free name for the output of ``node``."""
        return self.free(self.net.label(node))

    def write(self, op, inputs, name=None, outputs=None, **attrs):
        """Append an operator; returns the name of its output."""
        outputs = outputs or [name]
        attrs = {key: value for key, value in attrs.items() if value is not None}
        self.made.nodes.append(integer.Node(op, list(inputs), list(outputs), attrs, outputs[0]))
        return outputs[0]

    def constant(self, name, array, kind=None):
        """Add a constant; returns its name."""
        name = self.free(name)
        self.made.constants[name] = np.ascontiguousarray(array).reshape(np.shape(array))
        if kind:
            self.made.types[name] = kind
        return name

    def number(self, value, dtype='float32'):
        """The name of a constant scalar."""
        key = float(value), dtype
        if key not in self._written:
            self._written[key] = self.constant(f'{dtype}_{value:g}', np.asarray(value, dtype))
        return self._written[key]

    def shape(self, entry):
        """The shape of a tensor, 0 for the batch."""
        return self.shapes[entry.node, entry.index]

    def value(self, entry):
        """What stands for a tensor; a constant becomes a real one."""
        if self.constant_input(entry):
            key = entry.node, entry.index, 'constant'
            if key not in self._written:
                array = self.net.compute(entry).asnumpy().astype('float32')
                self._written[key] = Real(self.constant(self.net.label(entry.node), array))
            return self._written[key]
        return self.values[entry.node, entry.index]

    def constant_input(self, entry):
        """Whether a tensor depends on Parameters only."""
        return entry.node in self._constants

    def real(self, value):
        """The name of the float32 tensor of a value."""
        if isinstance(value, Real):
            return value.name
        key = id(value), 'real'
        if key not in self._written:
            self._written[key] = self._real(value), value       # the value, so that its id stays its own
        return self._written[key][0]

    def _real(self, value):
        if isinstance(value, Codes):
            return self.dequantize(value)
        if isinstance(value, Clamped):
            return self._clamp(value)
        codes = self.codes(value)
        if codes is not None:
            return self.dequantize(codes)
        return value.write(self.free(value.name), [self.real(source) for source in value.sources], None)

    def _clamp(self, value):
        name = self.free(value.name)
        if value.low == 0 and value.high is None:
            return self.write('Relu', [self.real(value.source)], name)
        bounds = ['' if bound is None else self.number(bound) for bound in (value.low, value.high)]
        return self.write('Clip', [self.real(value.source), *bounds], name)

    def dequantize(self, codes):
        """The name of the real tensor of codes."""
        base = codes.name[:-len('.codes')] if codes.name.endswith('.codes') else codes.name
        return self.write('DequantizeLinear', [codes.name, *self._grid_constants(codes.grid)], self.free(base))

    def _grid_constants(self, grid, encoder=False):
        scale = grid.encoder[1] if encoder and grid.encoder else grid.scale
        key = grid.path, float(scale), grid.zero_point, grid.dtype
        if key not in self._written:
            self._written[key] = (self.constant(f'{grid.path}.scale', np.float32(scale)),
                                  self.constant(f'{grid.path}.zero_point', np.asarray(grid.zero_point, grid.dtype)))
        return self._written[key]

    def grid(self, value):
        """The grid that a value is known to lie on, or None."""
        if isinstance(value, (Real, Codes)):
            return value.grid
        if isinstance(value, Moved):
            grids = [self.grid(source) for source in value.sources]
            if grids and all(grid is not None and _same(grid, grids[0]) for grid in grids):
                return grids[0]
        return None

    def codes(self, value):
        """`Codes` of a value that lies on a grid and can be written in codes; None if it cannot."""
        if isinstance(value, Codes):
            return value
        grid = self.grid(value)
        if grid is None or not isinstance(value, Moved) or not self.engine.moves_codes:
            return None
        sources = [self.codes(source) for source in value.sources]
        if None in sources:
            return None
        key = id(value), 'codes'
        if key not in self._written:
            name = value.write(self.free(f'{value.name}.codes'), [source.name for source in sources], grid)
            self._written[key] = Codes(name, grid), value
        return self._written[key][0]

    # Quantizers

    def _quantized(self, node):
        quantizer = self.net._children[node.attrs['quantizer']]
        source = self.value(node.inputs[0])
        if quantizer.grid is None:
            return source
        try:
            grid = self.engine.grid(node.attrs['quantizer'], quantizer)
        except ValueError as error:
            readers = ', '.join(repr(self.net.label(reader)) for reader in self.net.graph.readers(node)[:3])
            raise ValueError(f'{node.attrs["quantizer"]} (read by {readers}) cannot be exported to {self.engine.name}: '
                             f'{error}') from None
        if not self.engine.explicit:
            self.ranges[self.real(source)] = grid
            return Real(self.real(source), grid)
        made = self.quantize(source, grid)
        codes = made if isinstance(made, Codes) else self.codes(made)
        if codes is not None:
            self.tensors.append([codes.name, grid.path, int(grid.zero_point) - int(quantizer_zero(quantizer)),
                                 node.name])
        return made

    def quantize(self, value, grid):
        """A value on ``grid``. What moves elements happens to the codes: quantizers go in front of it."""
        key = id(value), grid.path, grid.low, grid.high
        if key not in self._written:
            self._written[key] = self._quantize(value, grid), value
        return self._written[key][0]

    def _quantize(self, value, grid):
        if isinstance(value, Clamped):
            return self.quantize(value.source, self._narrowed(grid, value))
        if isinstance(value, Moved) and self.grid(value) is None:
            moved = value._replace(sources=tuple(self.quantize(source, grid) for source in value.sources))
            self._written[id(moved), 'kept'] = moved
            return self.codes(moved) or moved
        before = self.grid(value)
        if before is not None and _same(before, grid) and before.low >= grid.low and before.high <= grid.high:
            return self.codes(value) or value
        return self._encode(value, grid)

    def _encode(self, value, grid):
        source, base = self.real(value), grid.path.rsplit('.', 1)[0]
        if grid.encoder and grid.encoder[0]:
            source = self.write('Sub', [source, self.number(grid.encoder[0])], self.free(f'{base}.shifted'))
        low, high = np.iinfo(grid.dtype).min, np.iinfo(grid.dtype).max
        inner = grid.low > low or grid.high < high
        if inner and not self.engine.clips_codes:
            source = self._clip_real(source, grid, base)
            inner = False
        name = self.free(f'{base}.codes')
        raw = self.free(f'{base}.unclipped') if inner else name
        self.write('QuantizeLinear', [source, *self._grid_constants(grid, encoder=True)], raw)
        if inner:
            self.write('Clip', [raw, self.number(grid.low, grid.dtype), self.number(grid.high, grid.dtype)], name)
        return Codes(name, grid._replace(encoder=None))

    def _clip_real(self, source, grid, base):
        """Clip in front of the quantizer, where the engine knows no clipped codes; what saturates is left to it."""
        if (grid.low, grid.high) == (-127, 127):
            return source
        scale = np.float32(grid.encoder[1] if grid.encoder else grid.scale)
        bounds = [self.number(scale * np.float32(bound - grid.zero_point)) for bound in (grid.low, grid.high)]
        return self.write('Clip', [source, *bounds], self.free(f'{base}.clipped'))

    @staticmethod
    def _narrowed(grid, clamp):
        """The part of a grid on which clamped values fall: rounding keeps order, so bounds become codes."""
        offset, scale = (np.float32(number) for number in grid.encoder or (0.0, grid.scale))

        def code(bound):
            return int(np.rint((np.float32(bound) - offset) / scale)) + grid.zero_point
        low = grid.low if clamp.low is None else min(max(grid.low, code(clamp.low)), grid.high)
        high = grid.high if clamp.high is None else max(min(grid.high, code(clamp.high)), low)
        return grid._replace(low=low, high=high)

    # Layers

    def weight(self, node, shape=None):
        """(name of the real weight, its scale or None): constants, from codes if the weight is quantized.

        ``shape`` : another one than the Parameter's.
        """
        label = self.net.label(node)
        quantize, _ = self.net.weight_parts(node)
        if quantize is None or self.net._children[quantize.attrs['quantizer']].grid is None:
            if shape is None or not self.constant_input(node.inputs[1]):
                return self.real(self.value(node.inputs[1])), None
            array = self.net.compute(node.inputs[1]).asnumpy().astype('float32')
            return self.constant(f'{label}.weight', array.reshape(shape)), None
        quantizer = self.net._children[quantize.attrs['quantizer']]
        codes, scale, factor = weight_of(self.net, node)
        codes, scale = absorb(codes, scale, factor) if node.op != 'Deconvolution' else _absorbed(codes, scale, factor)
        bias = node.inputs[2].node if len(node.inputs) > 2 else None
        if bias is not None and bias.op == BIAS:
            step = self.net._children[bias.attrs['activation']].qparams().scale[0]
            _, scale = bias_codes(self.net.compute(bias.inputs[0]).asnumpy(), step, scale)
        elif (scale <= 0).any():
            scale = np.where(scale > 0, scale, np.float32(1))
        four = self.int4 and quantizer.grid.bits <= 4
        low, high = (-8, 7) if four else (-128, 127)
        if codes.min() < low or codes.max() > high:
            raise ValueError(
                f'{node.op} {label!r} cannot be exported: its weight codes, {quantizer.method} of '
                f'{quantizer.grid.bits} bits, reach from {codes.min()} to {codes.max()}, engines take {low} to {high}. '
                + ('Finalize with int4=True' if four and codes.min() >= low else
                   'Use a symmetric method for the weight, such as int8, or one bit less'))
        axis = 1 if node.op == 'Deconvolution' else 0
        scale = scale if scale.size > 1 else scale.reshape(())
        kind = 'int4' if four else None
        codes = codes if shape is None else codes.reshape(shape)
        names = [self.constant(f'{label}.weight.codes', codes.astype(np.int8), kind),
                 self.constant(f'{label}.weight.scale', scale),
                 self.constant(f'{label}.weight.zero_point', np.zeros(scale.shape, np.int8), kind)]
        self.weights[names[0]] = quantize.attrs['quantizer']
        name = self.write('DequantizeLinear', names, self.free(f'{label}.weight'), axis=axis if scale.ndim else None)
        return name, scale

    def bias(self, node, scale):
        """[name of the real bias], from int32 codes if it is quantized; [] if there is none."""
        if len(node.inputs) < 3:
            return []
        bias = node.inputs[2]
        if bias.node.op != BIAS:
            return [self.real(self.value(bias))]
        label = self.net.label(node)
        array = self.net.compute(bias.node.inputs[0]).asnumpy()
        if not self.engine.integer_bias:
            return [self.constant(f'{label}.bias', self.net.compute(bias).asnumpy())]
        step = self.net._children[bias.node.attrs['activation']].qparams().scale[0]
        codes, weight_scale = bias_codes(array, step, scale)
        scales = np.float32(step) * weight_scale
        scalar = scale.ndim == 0 and (scales == scales[0]).all()
        names = [self.constant(f'{label}.bias.codes', codes.astype(np.int32)),
                 self.constant(f'{label}.bias.scale', scales[0] if scalar else scales),
                 self.constant(f'{label}.bias.zero_point', np.zeros(() if scalar else scales.shape, np.int32))]
        return [self.write('DequantizeLinear', names, self.free(f'{label}.bias'), axis=None if scalar else 0)]

    def _metadata(self):
        net = self.net
        plan = {path: {'method': quantizer.method, 'bits': quantizer.grid.bits, 'role': quantizer.role,
                       'signed': quantizer.grid.signed}
                for path, quantizer in net._children.items() if getattr(quantizer, 'grid', None) is not None}
        return {'gluonquant': json.dumps({'format': FORMAT, 'target': self.engine.name, 'quantizers': plan,
                                          'tensors': self.tensors})}


def quantizer_zero(quantizer):
    """The zero point of an activation quantizer, as its own codes count."""
    return quantizer.qparams().zero_point[0]


def _absorbed(codes, scale, factor):
    """`absorb` for the weight of a transposed convolution, whose output channels are axis 1."""
    if factor is None:
        return codes, scale
    turned, scale = absorb(codes.swapaxes(0, 1), scale, factor)
    return turned.swapaxes(0, 1), scale


def _same(first, second):
    return (first.path, float(first.scale), first.zero_point, first.dtype) == (
        second.path, float(second.scale), second.zero_point, second.dtype)


def _constants(net):
    """The nodes whose outputs depend on Parameters only."""
    found = set()
    for node in net.graph.nodes():
        if node.op == VARIABLE:
            if node.name not in net.inputs:
                found.add(node)
        elif node.inputs and all(entry.node in found for entry in node.inputs):
            found.add(node)
    return found


def _free_batch(graph, shapes, parameters):
    """{(node, index): shape} with 0 where a size grows with the batch."""
    found = []
    for batch in (2, 3):
        known = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
        found.append(graph.shapes(**parameters, **known))
    return {key: tuple(0 if size != other else size for size, other in zip(shape, found[1][key]))
            for key, shape in found[0].items()}


def _drop_unread(model):
    """Take away what no output depends on: a writer may find that it needs no tensor of an input, only its shape."""
    wanted, kept = set(model.outputs), []
    for node in reversed(model.nodes):
        if wanted & set(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    model.nodes = kept[::-1]
    model.constants = {name: array for name, array in model.constants.items() if name in wanted}


def _skip_identities(model):
    """Let whatever makes an output have the output's name."""
    makers, readers = model.maker(), model.readers()
    for node in list(model.nodes):
        if node.op == 'Identity' and node.outputs[0] in model.outputs:
            source = node.inputs[0]
            if source in makers and len(readers[source]) == 1 and source not in model.outputs:
                maker = makers[source]
                maker.outputs = [node.outputs[0] if name == source else name for name in maker.outputs]
                model.nodes.remove(node)
