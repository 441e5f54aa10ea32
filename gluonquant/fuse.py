"""Fewer, larger operators in the graph of a converted net: quantizers take in the clamp and the sum before them."""
import re
from functools import lru_cache

import mxnet as mx
from mxnet.gluon import Block, HybridBlock
from mxnet.ndarray import NDArray

from .layers import QuantizedLayer, named_blocks, quantizers
from .ops.load import PREFIXES
from .symbol_graph import Entry, Graph, Node, ancestors

QUANTIZERS = frozenset(prefix + 'activation' for prefix in PREFIXES.values())
_TAKEN = {'add', 'low', 'high', 'keep'}      # attributes of a quantizer that has taken something in


def fused(symbol):
    """A symbol that computes the same with fewer passes over memory; ``symbol`` itself if there is nothing to do.

    - A ReLU or clip in front of a quantizer, and an elementwise sum in front of that, become part of the quantizer.
      Others that read the clamped tensor or the sum read the quantizer's last output.
    - A ReLU in front of a max pooling moves behind it, where there are fewer elements, and in front of a quantizer.
    - A global average pooling becomes a mean over the same axes: oneDNN's, of MXNet 1.9.1, is many times slower.

    Names, attributes, shared and auxiliary variables and the order of outputs stay; what was taken in is gone, and an
    output that it provided is named after the quantizer.
    """
    if type(symbol) is not mx.sym.Symbol:       # of mx.np, whose operators have other names
        return symbol
    graph = Graph.load(symbol.tojson(remove_amp_cast=False))
    return mx.sym.load_json(graph.dump()) if rewrite(graph) else symbol


def rewrite(graph):
    """`fused` on a `Graph`, in place; whether anything changed."""
    changed = False
    for node in graph.nodes():
        if node.op in QUANTIZERS and not _TAKEN & set(node.attrs):
            guard = _lift_guard(graph, node)
            changed |= _take_clamp(graph, node)
            changed |= _take_sum(graph, node)
            _lower_guard(graph, node, guard)
        elif _is_max_pooling(node):
            changed |= _pool_first(graph, node)
        elif _is_global_average(node):
            hidden = {key: value for key, value in node.attrs.items() if key.startswith('__')}
            node.op, node.attrs = 'mean', {**hidden, 'axis': '(2, 3)', 'keepdims': 'True'}
            changed = True
    return changed


def outputs(attrs):
    """How many outputs a quantizer with these attributes has, as ``ops/src/shapes.h`` counts them.

    The tensor; the bits that say where gradients pass, unless they pass everywhere or the method reads x again for
    that; and what is kept.
    """
    again = attrs['method'] in ('lsq', 'lsqplus', 'qil')
    bits = not again and (_clamped(attrs) or _says(attrs, 'gate') or attrs['method'] == 'pact')
    return 1 + bits + _says(attrs, 'keep')


def _says(attrs, name):
    return attrs.get(name) == '1'


def _clamped(attrs):
    return 'low' in attrs or 'high' in attrs


def _lift_guard(graph, quantizer):
    """Take away, and return, the identity in front of the tensor if there is one: see `Quantizer.operands`."""
    guard = quantizer.inputs[0].node
    if guard.op != '_copy' or graph.readers(guard) != [quantizer]:
        return None
    graph.connect(quantizer, [*guard.inputs, *quantizer.inputs[1:]])
    return guard


def _lower_guard(graph, quantizer, guard):
    """Put ``guard`` back, and another one in front of what is added to the tensor."""
    if guard is None:
        return
    places, guards = [0], [guard]
    if _says(quantizer.attrs, 'add'):
        places.append(-1)
        guards.append(Node('_copy', f'{guard.name}_other', dict(guard.attrs), [], []))
    inputs = list(quantizer.inputs)
    for place, node in zip(places, guards):
        graph.connect(node, [inputs[place]])
        inputs[place] = Entry(node)
    graph.connect(quantizer, inputs)


def _take_clamp(graph, quantizer):
    clamp = quantizer.inputs[0].node
    attrs = _clamp(clamp)
    if not attrs or _steered(quantizer, clamp):
        return False
    quantizer.attrs.update(attrs)
    _take(graph, quantizer, clamp)
    return True


def _clamp(node):
    """What a quantizer says of the clamp it has taken in; {} if ``node`` is none."""
    if node.op == 'relu' or (node.op == 'Activation' and node.attrs['act_type'] == 'relu'):
        return {'low': '0', 'high': 'inf', 'relu': '1'}     # no gradient at 0, unlike clip's
    if node.op == 'clip':
        return {'low': node.attrs['a_min'], 'high': node.attrs['a_max']}
    return {}


def _take_sum(graph, quantizer):
    total = quantizer.inputs[0].node
    # elemwise_add is what JSON calls `+`, _plus, _add and F.elemwise_add; others may broadcast.
    if total.op != 'elemwise_add' or total.inputs[0] == total.inputs[1] or _steered(quantizer, total):
        return False
    # Behind a clamp, the quantizer keeps the clamped sum and has no output for the sum itself.
    if _clamped(quantizer.attrs) and graph.readers(total) != [quantizer]:
        return False
    quantizer.attrs.update(add='1', inputs=quantizer.attrs['inputs'] + ',other')
    _take(graph, quantizer, total)
    return True


def _steered(quantizer, node):
    """Whether a parameter of the quantizer depends on ``node``: its readers could not wait for the quantizer then."""
    return node in ancestors(quantizer.inputs[1:])


def _take(graph, quantizer, node):
    """Read the input of ``node`` in its place, a second one last; its other readers get the last output."""
    graph.connect(quantizer, [node.inputs[0], *quantizer.inputs[1:], *node.inputs[1:]])
    if graph.readers(node):
        quantizer.attrs['keep'] = '1'
    kept = Entry(quantizer, outputs(quantizer.attrs) - 1)
    for reader in set(graph.readers(node)):
        graph.connect(reader, [kept if entry.node is node else entry for entry in reader.inputs])


def _is_max_pooling(node):
    return node.op == 'Pooling' and node.attrs.get('pool_type', 'max') == 'max'


def _pool_first(graph, pool):
    """relu then pool -> pool then relu: equal values, and the gradient goes to the same place or is 0."""
    relu = pool.inputs[0].node
    if 'relu' not in _clamp(relu) or graph.readers(relu) != [pool]:
        return False
    readers = set(graph.readers(pool))
    graph.connect(pool, relu.inputs)
    graph.connect(relu, [Entry(pool)])
    for reader in readers:
        graph.connect(reader, [Entry(relu) if entry.node is pool else entry for entry in reader.inputs])
    return True


def _is_global_average(node):
    """Whether ``node`` averages over both spatial axes of an (N, C, H, W) tensor: pooling has one kernel size each."""
    attrs = node.attrs
    return (node.op == 'Pooling' and attrs.get('global_pool') in ('True', 'true', '1')
            and attrs.get('pool_type') == 'avg' and len(re.findall(r'\d+', attrs.get('kernel', ''))) == 2
            and attrs.get('pooling_convention', 'valid') in ('valid', 'full')
            and attrs.get('layout', 'None') in ('None', 'NCHW'))


class FusedGraph:
    """Fuses the graph of a hybridized block when it is traced. Stands before the block's class among the bases.

    `install` makes the class; it keeps the name of the one it stands for, and copies and pickles like it.
    """
    _traced_class = None

    def _get_graph(self, *args):
        if not self._cached_graph:
            inputs, out = super()._get_graph(*args)
            weights = [quantizer.bound for quantizer in quantizers(self, 'weight').values() if quantizer.bound]
            unknown = [weight for weight in weights if not weight.shape or not all(size > 0 for size in weight.shape)]
            if unknown and all(isinstance(arg, NDArray) for arg in args):
                # A quantizer whose weight has no shape yet is composed of plain operators. That graph tells the shapes;
                # then the net is traced again.
                self._deferred_infer_shape(*args)
                self._cached_graph = ()
                for weight in unknown:
                    weight._var = None      # the variable remembers the shape it was made with
                inputs, out = super()._get_graph(*args)
            self._cached_graph = inputs, fused(out)
        return self._cached_graph

    def __reduce_ex__(self, protocol):
        if self._traced_class is None:
            return super().__reduce_ex__(protocol)
        # pickle looks for a class by its name, and there it finds the original.
        make, args, *rest = super().__reduce_ex__(protocol)
        make, *args = (self._traced_class if part is type(self) else part for part in (make, *args))
        return (_make_fused, (make, *args), *rest)


def fuse(net):
    """Let a float ``net`` train on the cheaper graph that `convert` gives a quantized one; returns net.

    Global average pooling becomes a mean when the net is hybridized, which alone makes a step of a ResNet-20 1.6 times
    faster; values differ by rounding (MXNet sums a float16 mean in float16). Converting, attaching, saving and loading
    the net work as before. A SymbolBlock, whose graph exists already, stays as it is.

    Raises
    ------
    TypeError
        ``net`` is not a Block.
    """
    if not isinstance(net, Block):
        raise TypeError(f'net is a {type(net).__name__}, not a gluon Block')
    for block in _topmost(net):
        _install(block)
    return net


def install(net):
    """Let the graphs of a converted ``net`` be fused whenever they are traced; returns net.

    Changes the class of the topmost HybridBlocks that contain quantized layers: those are traced as a whole. A
    layer that is traced by itself has nothing in front of its quantizer.
    """
    for block in _topmost(net):
        if quantizers(block):
            _install(block)
    return net


def _install(block):
    if not isinstance(block, (FusedGraph, QuantizedLayer)):
        block.__class__ = _fused_class(type(block))
        block._clear_cached_op()


def uninstall(net):
    """Undo `install`, before or after the layers are float again; returns net."""
    for _, block in named_blocks(net):
        if isinstance(block, FusedGraph) and block._traced_class:
            block.__class__ = block._traced_class
            block._clear_cached_op()
    return net


def _topmost(block):
    if isinstance(block, HybridBlock):
        yield block
    else:
        for child in block._children.values():
            yield from _topmost(child)


@lru_cache(maxsize=None)
def _fused_class(cls):
    about = {name: getattr(cls, name) for name in ('__module__', '__qualname__', '__doc__')}
    return type(cls)(cls.__name__, (FusedGraph, cls), {**about, '_traced_class': cls})


def _make_fused(make, *args):
    block = make(*args)
    object.__setattr__(block, '__class__', _fused_class(type(block)))
    return block
