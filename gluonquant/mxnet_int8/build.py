"""`to_mxnet_int8`: from the graph of a finalized net to MXNet's integer operators."""
import mxnet as mx

from ..export.onnx_file import final_net
from ..finalize import check_deployable
from ..graph.target import passes
from ..symbol_graph import QUANTIZE, VARIABLE, Entry, ancestors
from ..trace import LAYER_OPS
from . import chain, layers
from .block import make, mark
from .forms import Form
from .layers import Step
from .writer import Writer

# What MXNet does to 8-bit integers, too. Pad, for one, it does not.
MOVES = ('Concat', 'Flatten', 'Reshape', 'SliceChannel', 'SwapAxis', '_copy', 'expand_dims', 'slice_axis', 'squeeze',
         'transpose')


def to_mxnet_int8(net, *, strict=False, inputs='data', overflow='raise'):
    """A quantized net on MXNet's integer operators (oneDNN), as a block for inference on the CPU.

    Layers with quantized inputs run in one of three ways, which ``steps`` tells:

    - 'fused': a convolution in one operator with the sum, the ReLU or clip, and the quantizer behind it.
    - 'integer': sums of integers, their scale and the bias in float32. For layers with float outputs, and where the
      codes of some channel's weight do not reach 127, which the fused convolution asks for: method 'int8' with 8 bits
      always does, others and fewer bits rarely. A convolution that runs so may be slower than in float.
    - 'float': on quantized values, no faster than the float net. Grouped convolutions other than depthwise, transposed
      ones, what pads an input with a zero point, and what 'integer' does not take: signed input, groups.

    All compute on the trained grids. What is left are roundings of float32 behind the sums, which move a code by one
    where a value lies next to a tie, and so what depends on it; of a bias, where a shortcut's codes have to be moved
    to the type of the sum; and a few weights, counted in ``steps``, that MXNet rounds to -128 instead of -127.

    Attach with ``target='onednn'``, so that sums run fused and no operators have to clip codes to -127.

    Parameters
    ----------
    net : HybridBlock from `convert`, GraphNet from `attach`, or what `finalize` made of one
        It stays as it is. One that is not final is finalized.
    strict : bool
        Refuse nets of which a layer with a quantized input would run in float.
    inputs : str or sequence of str
        Names of the inputs of a converted net.
    overflow : see `finalize`

    Returns
    -------
    SymbolBlock
        Takes float32, returns float32, several outputs as a flat list. Its Parameters are constants. ``steps`` is a
        list of `Step`. Hybridize it with ``static_alloc=True, static_shape=True``; ``export`` writes files that
        `SymbolBlock.imports` reads. Processors without VNNI instructions may saturate sums in 16 bits.

    Raises
    ------
    TypeError
        ``net`` is no block.
    ValueError
        Activations beyond 8 bits; with ``strict``, a layer in float. The node and the remedy are named. See also
        `finalize`.
    RuntimeError
        A quantizer has no range yet, or is switched off; this MXNet has no oneDNN.
    """
    if not mx.runtime.Features().is_enabled('MKLDNN'):
        raise RuntimeError('this build of MXNet has no oneDNN, whose integer operators are needed: install the wheel '
                           'mxnet==1.9.1 for CPUs')
    net = final_net(net, inputs, overflow)
    for path, quantizer in net._children.items():
        check_deployable(path, quantizer)
    builder = _Builder(net)
    heads = builder.heads()
    steps = [builder.steps[node] for node in ancestors(heads) if node in builder.steps]
    floats = [step for step in steps if step.how == 'float']
    if strict and floats:
        raise ValueError(f'{floats[0].op} {floats[0].node!r} cannot run on integers: {floats[0].reason}. Pass '
                         f'strict=False to run {"it" if len(floats) == 1 else f"it and {len(floats) - 1} others"} in '
                         'float')
    block = make(heads, builder.constants, net.inputs)
    block.steps = steps
    return block


class _Builder(Writer):
    """Makes nodes of the integer graph on demand.

    Attributes
    ----------
    steps : dict, {new node: Step}
    """

    def __init__(self, net):
        super().__init__()
        self.net, self.graph, self.steps = net, net.graph, {}
        self._values, self._codes, self._forms, self._constant, self._refused, self._on_codes = {}, {}, {}, {}, {}, {}
        for node in self.graph.nodes():
            self._constant[node] = node.name not in net.inputs and all(self._constant[entry.node]
                                                                       for entry in node.inputs)

    def heads(self):
        """The outputs of the net."""
        for node in self.graph.nodes():         # in order, so that nothing recurs deeply
            self.codes(Entry(node))
        return [self.value(entry) for entry in self.graph.heads.inputs]

    def value(self, entry):
        """The float tensor of an entry of the net's graph."""
        key = entry.node, entry.index
        if key not in self._values:
            self._values[key] = self._value(entry)
        return self._values[key]

    def _value(self, entry):
        node = entry.node
        if self._constant[node]:
            return self.constant(node.name, self.net.compute(entry).asnumpy())
        if node.op == VARIABLE:
            return self.add(VARIABLE, node.name, [])
        codes = self.codes(entry)
        if codes is not None:
            return self.decoded(codes, f'{node.name}_decoded')
        if node.op == QUANTIZE:         # method 'none'
            return self.value(node.inputs[0])
        made = self._layer(node) if node.op in LAYER_OPS else None
        made = (made or self._same(node)).node
        for reader in self.graph.readers(node):
            self._values.update({(node, other.index): Entry(made, other.index) for other in reader.inputs
                                 if other.node is node})
        return Entry(made, entry.index)

    def _same(self, node):
        """The operator itself, on float tensors."""
        made = self.add(node.op, node.name, [self.value(entry) for entry in node.inputs], **node.attrs)
        made.node.subgraphs = node.subgraphs
        return made

    def codes(self, entry, dtype=None):
        """The `Codes` of an entry of the net's graph, of the type ``dtype`` if one is given; None if it is float."""
        key = entry.node, entry.index, dtype
        if key not in self._codes:
            self._codes[key] = self._found(entry) if dtype is None else self._typed(entry, dtype)
        return self._codes[key]

    def _found(self, entry):
        node = entry.node
        if self._constant[node] or node.op == VARIABLE:
            return None
        if node.op == QUANTIZE:
            form = self._form(node)
            return None if form is None else self._quantized(node, form)
        if not passes(node) and node.op != 'Concat':
            return None
        codes = [self.codes(other) for other in node.inputs[:None if node.op == 'Concat' else 1]]
        if None in codes or len({other[1:] for other in codes}) > 1:
            return None
        return codes[0]._replace(entry=self._moved(entry, codes))

    def _moved(self, entry, codes):
        """What moves or selects values, on codes."""
        node, (_, scale, dtype, shift) = entry.node, codes[0]
        if chain.is_max_pooling(node):
            return self.pooled(node, codes[0].entry, scale, dtype)
        if node.op in MOVES:
            if node not in self._on_codes:
                self._on_codes[node] = self.add(node.op, node.name, [other.entry for other in codes], **node.attrs)
            return Entry(self._on_codes[node].node, entry.index)
        self._values.update({(node, entry.index): Entry(self._same(node).node, entry.index)})
        form = Form(scale, dtype, 0, 0, shift, shift, scale, shift * scale)
        return self.encoded(self._values[node, entry.index], f'{node.name}_codes', form)

    def _form(self, node):
        """The `Form` of a quantizer's node, None for one that does nothing."""
        path = node.attrs['quantizer']
        if path not in self._forms:
            quantizer = self.net._children[path]
            self._forms[path] = None if quantizer.grid is None else Form.of(path, quantizer)
        return self._forms[path]

    def _quantized(self, node, form):
        """`Codes` of a quantizer."""
        made = self._stored(node.inputs[0], node.attrs['quantizer'], form)
        mark(made, node.name, form.shift - form.zero)
        return form.codes(made)

    def _stored(self, entry, name, form):
        """The codes of a tensor that only a quantizer reads, by the convolution that makes it if that can be."""
        if entry.node.op == 'Concat' and len(self.graph.readers(entry.node)) == 1:
            parts = [self._stored(other, name, form) for other in entry.node.inputs]
            return self.add('Concat', entry.node.name, parts, **entry.node.attrs)
        found = chain.find(self.graph, entry, form, lambda other: self.codes(other) is not None)
        made = self._fused(found) if found is not None else None
        if made is None:
            made = self.encoded(self.value(entry), name, form)
        else:
            form = found.form
            if found.pool is not None:
                made = self.pooled(found.pool, made, form.scale, form.dtype)
        return self.clipped(made, name, form)

    def _fused(self, found):
        node, form = found.layer, found.form
        data = self.codes(node.inputs[0])
        refused = 'its input is float' if data is None else layers.shape_refused(node, data)
        made = None if refused else layers.weight(self.net, node, data)
        if refused or isinstance(made, str):
            return None
        # oneDNN adds the shortcut in the type of the output, whatever its own is: int8 under uint8 gave up to a third
        # of all codes wrong, without an error. So the shortcut is stored in that type.
        rest = None if found.rest is None else self.codes(found.rest, form.dtype)
        out = layers.fused(self, found, data, made, rest)
        if isinstance(out, str):
            self._refused[node] = out
            return None
        entry, reason = out
        if form.clips:
            reason = '; '.join(filter(None, [reason, f'a further operator clips codes to {form.low}..{form.high}']))
        self.steps[entry.node] = Step(self.net.label(node), node.op, 'fused', reason)
        return entry

    def _typed(self, entry, dtype):
        codes = self.codes(entry)
        if codes.dtype == dtype:
            return codes
        node = entry.node
        if node.op == QUANTIZE:
            form = self._form(node).stored(dtype)
            return self._quantized(node, form) if len(self.graph.readers(node)) == 1 else self._turned(entry, form)
        form = Form(codes.scale, codes.dtype, 0, 0, codes.shift, codes.shift, codes.scale, codes.shift * codes.scale)
        return self._turned(entry, form.stored(dtype))

    def _turned(self, entry, form):
        """Codes that exist in one type, in the other; MXNet has no integer operator for that."""
        return form.codes(self.encoded(self.value(entry), f'{entry.node.name}_{form.dtype}', form))

    def _layer(self, node):
        """A layer with float outputs on integers; None, or the operator itself, if it cannot be."""
        data = self.codes(node.inputs[0])
        if data is None:
            return None
        reason = layers.shape_refused(node, data)
        made = reason or layers.weight(self.net, node, data)
        if not isinstance(made, str):
            made = layers.with_float_output(self, node, data, made)
        refused = self._refused.get(node, '')
        if isinstance(made, str):
            reason = '; '.join(filter(None, [refused, made]))
            made = self._same(node)
            self.steps[made.node] = Step(self.net.label(node), node.op, 'float', reason)
        else:
            self.steps[made.node] = Step(self.net.label(node), node.op, 'integer', refused)
        return made
