"""`attach`: decide for every tensor of a graph whether and how it is quantized, and make the net that does so."""
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import NamedTuple

from ..calibrate import set_ranges
from ..config import QuantizerSpec, Rule, matches
from ..grid import check_bits
from ..layers import quantizers
from ..plan import base_config, check_patterns, end_config, settle_sign, start
from ..registry import nearest
from ..symbol_graph import QUANTIZE, VARIABLE, Entry, canonical
from ..trace import LAYER_OPS, nonnegative
from . import place, source
from .net import Decision, GraphNet, bound_variable
from .target import find

OPS = ('Convolution', 'FullyConnected', 'Deconvolution', 'Concat', 'Pooling', 'add_n', 'elemwise_add')


def attach(net, bits=4, *, params=None, inputs='data', shapes=None, ops=OPS, target=None, method=None, weight=None,
           activation=None, weight_bits=None, activation_bits=None, first_last_bits=8, exclude=(), skip=None, only=None,
           skip_scalars=False, rules=(), per_channel=None, signed=None, weight_options=None, activation_options=None,
           table=None, freeze_batchnorm=False):
    """Quantize the graph of a net: weights, and the tensors between operators, inside blocks too.

    The net itself does not change; it and the result share their Parameters. Calibrate, hybridize, train the result.

    Parameters
    ----------
    net : HybridBlock, Symbol, Graph or str
        A float net, or the path of a ``*-symbol.json`` file.
    bits, method, weight, activation, weight_bits, activation_bits, first_last_bits, per_channel, signed, \
    weight_options, activation_options
        As for `convert`. ``first_last_bits`` is about the first layer and the last fully connected one.
    params : str or dict, optional
        With a symbol or a file: the path of a ``.params`` file, or {name: array}.
    inputs : str or sequence of str
        Names for, or of, the net's inputs.
    shapes : dict, optional
        {input: shape}; helps ``skip_scalars`` to see which tensors have one element.
    ops : sequence of str
        Operators whose inputs are quantized, and the weights of Convolution, FullyConnected and Deconvolution. Any
        operator may be named; on request for example broadcast_add, broadcast_mul, mean, max, relu, Activation,
        sigmoid, Dropout. Inputs that are Parameters stay float.
    target : 'tensorrt', 'onnxruntime', 'openvino', 'onednn' or Target, optional
        Place quantizers where this engine wants them, see `Target`. None: in front of the operators of ``ops``, nowhere
        else, one for each tensor.
    exclude : str or sequence of str
        Shell patterns of nodes that stay float: names in the graph (``'*_conv3_fwd'``), or paths of layers
        (``'features.4.*'``).
    skip, only : dict, optional
        {operator: N}: leave the first N of them float; quantize the first N only.
    skip_scalars : bool
        Leave operators float that have an input of one element.
    rules : sequence of Rule or dict
        Other settings by the patterns of ``exclude``; later ones win.
    table : dict or str, optional
        Initial ranges, {tensor or node: amax or (lo, hi)}, or the path of a JSON file with them; see `calibrate`.
    freeze_batchnorm : bool
        As by `gluonquant.freeze_batchnorm`.

    Returns
    -------
    GraphNet

    Raises
    ------
    ValueError
        As `convert`; the graph is broken (the node is named); no tensor to quantize is left.
    RuntimeError
        The net is quantized already.
    TypeError
        ``net`` has no graph.
    """
    bits = check_bits(bits)
    target = find(target)
    if target is not None and signed is None:
        signed = target.signed
    base = base_config(bits, method, (weight, weight_bits, weight_options), (activation, activation_bits,
                       activation_options), per_channel, signed, None)
    found = source.read(net, params, inputs)
    graph = found.graph
    plan = _Plan(found, base, first_last_bits, ops, skip, only, rules, exclude)
    if skip_scalars:
        plan.skip_scalars(graph.shapes(**{**_shapes(found), **(shapes or {})}))
    plan.decide()
    if target is None:
        places, refused, passed = place.place(plan.wishes), {}, {}
    else:
        places, refused, passed = place.place_for(target, graph, plan.wishes, base.activation, found.label)
    placed = {**_insert(graph, place.place(plan.weights), 'weight', lambda spec, _: spec, plan.weight_path),
              **_insert(graph, places, 'activation', plan.sign, lambda entry: f'{plan.tensor(entry)}.output_quantizer')}
    if not placed:
        raise ValueError(f'nothing is left to quantize among the {len(plan.nodes)} operators')
    order = {plan.paths.get(node): number for number, node in enumerate(graph.nodes())}
    decisions = sorted(_explained(plan, placed, refused, passed), key=lambda decision: order[decision.node])
    made = GraphNet(graph, found.parameters, found.inputs, found.paths, found.form, found.scope, decisions)
    for quantizer in quantizers(made, 'weight').values():
        if quantizer.bound is not None and quantizer.bound._data is not None:       # see convert.apply
            quantizer.bound.reset_ctx(quantizer.bound.list_ctx())
    if table is not None:
        set_ranges(made, table)
    if freeze_batchnorm:
        made.freeze_batchnorm()
    return made


class _Plan:
    """What every node asks for, and why."""

    def __init__(self, found, base, first_last_bits, ops, skip, only, rules, exclude):
        self.source, self.graph, self.base = found, found.graph, base
        self.nodes = [node for node in self.graph.nodes() if node.op != VARIABLE]
        self.label = found.label
        self.paths = {node: found.path(node) for node in self.nodes}
        self.ops = {_operator(name, 'ops') for name in ([ops] if isinstance(ops, str) else ops)}
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.rules = [rule if isinstance(rule, Rule) else Rule(**rule) for rule in rules]
        names = list(dict.fromkeys(name for node in self.nodes for name in (node.name, self.paths[node])))
        check_patterns([*self.exclude, *(rule.pattern for rule in self.rules)], names, 'node')
        self.first_last_bits = None if first_last_bits is None else check_bits(first_last_bits, 'first_last_bits')
        self.skip, self.only = (_counts(value, name, self.nodes) for value, name in ((skip, 'skip'), (only, 'only')))
        self.nonnegative = nonnegative(self.graph)
        self.scalars = {}
        self.moving = self._moving(set(found.inputs))
        self.wishes, self.weights, self.decisions = [], [], []

    def _moving(self, inputs):
        """Nodes whose value depends on the net's inputs, or on chance."""
        moving = set()
        for node in self.graph.nodes():
            if node.name in inputs or any(entry.node in moving for entry in node.inputs) or \
                    (node.op != VARIABLE and not node.inputs and 'random' in node.op):
                moving.add(node)
        return moving

    def skip_scalars(self, shapes):
        """Leave float what has an input of one element."""
        for node in self.nodes:
            if node.op.endswith('_scalar'):
                self.scalars[node] = 'it has a number as input (skip_scalars)'
            for entry in node.inputs:
                shape = shapes.get(entry[:2])
                if shape and all(size == 1 for size in shape):
                    self.scalars[node] = f'its input {self.label(entry.node)!r} has one element (skip_scalars)'

    def sign(self, spec, entries):
        """The settings of activations that share a quantizer, with their sign."""
        return settle_sign(spec, all(self.nonnegative[entry.node] for entry in entries))

    def tensor(self, entry):
        """The name of a tensor as users read it."""
        return self.label(entry.node) + (f'[{entry.index}]' if entry.index else '')

    def weight_path(self, entry):
        """Where the quantizer of a weight stands in the net: beside the weight."""
        name = bound_variable(entry)
        return f'{self.source.paths.get(name, name)}_quantizer'

    def decide(self):
        """Collect the wishes of all nodes."""
        ends = self._ends()
        seen = Counter()
        for node in self.nodes:
            seen[node.op] += node.op in self.ops
            reason = self._refusal(node, ends, seen[node.op])
            if reason is None:
                config, why = self._config(node, ends)
                self._wish(node, config, why)
            else:
                self.decisions.append(Decision(self.paths[node], node.op, '', None, reason))

    def _ends(self):
        layers = [node for node in self.nodes if node.op in LAYER_OPS]
        dense = [node for node in layers if node.op == 'FullyConnected']
        return {layers[0], (dense or layers)[-1]} if layers else set()

    def _matches(self, pattern, node):
        return matches(pattern, node.name) or matches(pattern, self.paths[node])

    def _refusal(self, node, ends, number):
        """Why ``node``, the ``number``-th of its operator, stays float; None if it does not."""
        if node.op not in self.ops:
            return f'{node.op} is not among ops'
        for pattern in self.exclude:
            if self._matches(pattern, node):
                return f'exclude={pattern!r}'
        if node in self.scalars:
            return self.scalars[node]
        if number <= self.skip.get(node.op, 0):
            return f'skip: number {number} of the {node.op} nodes, the first {self.skip[node.op]} stay float'
        if number > self.only.get(node.op, number):
            return f'only: number {number} of the {node.op} nodes, the first {self.only[node.op]} are quantized'
        if node in ends and self.first_last_bits is None:
            return 'first or last layer, first_last_bits=None'
        if node.op in LAYER_OPS and node.inputs[1].node in self.moving:
            return 'its weight is computed from data'
        return None

    def _config(self, node, ends):
        config, why = self.base, [f'{node.op} is among ops']
        if node in ends:
            config = end_config(config, self.first_last_bits)
            why.append(f'first or last layer: first_last_bits={self.first_last_bits}')
        for rule in self.rules:
            if self._matches(rule.pattern, node):
                config = rule.apply(config, start)
                why.append(f'rule {rule.pattern!r}')
        return config, '; '.join(why)

    def _wish(self, node, config, why):
        data = node.inputs
        if node.op in LAYER_OPS:
            layout = node.attrs.get('layout', 'None')
            if layout != 'None' and not layout.startswith('NC'):
                raise ValueError(f'node {node.name!r} ({node.op}) has layout {layout}; only channel-first layouts '
                                 f'(NCW, NCHW, NCDHW) are supported. Keep it float with exclude=[{node.name!r}]')
            data = node.inputs[:1]
            self._wish_weight(node, config.weight, why)
        for slot, entry in enumerate(data):
            if entry.node not in self.moving:
                self.decisions.append(Decision(self.paths[node], node.op, self.label(entry.node), None,
                                               'a Parameter, or computed from Parameters only'))
            elif config.activation.method == 'none':
                self.decisions.append(Decision(self.paths[node], node.op, self.label(entry.node), None,
                                               f"{why}; method 'none'"))
            else:
                self.wishes.append(place.Wish(entry, config.activation, why, node, slot))

    def _wish_weight(self, node, spec, why):
        name = self.label(node.inputs[1].node)
        if spec.method == 'none':
            self.decisions.append(Decision(self.paths[node], node.op, name, None, f"{why}; method 'none'"))
            return
        if node.op == 'Deconvolution':
            # With groups, axis 1 counts the channels of one group and several output channels share an index.
            grouped = int(node.attrs.get('num_group', 1)) > 1
            spec = replace(spec, options={**spec.options, 'axis': 1},
                           per_channel=False if grouped else spec.per_channel)
        self.weights.append(place.Wish(node.inputs[1], spec, why, node, 1))


def _operator(name, argument):
    try:
        return canonical(name)
    except ValueError as error:
        raise ValueError(f'{argument}: {error}') from None


def _counts(value, argument, nodes):
    present = {node.op for node in nodes}
    counts = {}
    for name, count in (value or {}).items():
        op = _operator(name, argument)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f'{argument}={{{name!r}: {count!r}}}: pass a number of nodes >= 0')
        if op not in present:
            raise ValueError(f'{argument} names {name!r}, which the graph does not have.{nearest(op, present)}')
        counts[op] = count
    return counts


def _shapes(found):
    return {name: parameter.shape for name, parameter in found.parameters.items()
            if parameter.shape and all(size > 0 for size in parameter.shape)}


class _Placed(NamedTuple):
    entry: Entry
    spec: QuantizerSpec
    group: Entry
    path: str
    reason: str


def _insert(graph, places, role, settle, path_of):
    """Put quantizers into the graph; returns {(reader, slot): _Placed}.

    ``settle(spec, entries)`` completes the settings of tensors that share a quantizer, ``path_of(entry)`` names it.
    """
    groups = {}
    for found in places:
        groups.setdefault(found.group, []).append(found)
    placed = {}
    for group in groups.values():
        spec = settle(group[0].spec, [found.entry for found in group])
        path = graph.free_name(path_of(group[0].entry))
        described = {**asdict(spec), 'role': role}
        if role == 'weight':
            described['axis'] = described['options'].pop('axis', 0)
        for entry, wished, edges, found_group, reason in group:
            node = graph.add(QUANTIZE, path, [entry], quantizer=path, spec=json.dumps(described))
            for reader, slot in edges:
                graph.connect(reader, [*reader.inputs[:slot], Entry(node), *reader.inputs[slot + 1:]])
                placed[reader, slot] = _Placed(entry, wished, found_group, path, reason)
    return placed


def _explained(plan, placed, refused, passed):
    """The decisions about all nodes."""
    own = {(wish.reader, wish.slot): wish for wish in [*plan.weights, *plan.wishes]}
    groups = {found.group: found.path for found in placed.values()}
    found, quantized = [], set()

    def note(reader, entry, path, reason):
        if path is not None and reader.op not in plan.ops:
            reason = f'{reader.op} is not among ops, but reads what is stored quantized: {reason}'
            quantized.add(plan.paths[reader])
        found.append(Decision(plan.paths[reader], reader.op, plan.tensor(entry), path, reason))
    for edge, made in placed.items():
        reason = made.reason
        if edge in own:
            shared = '' if own[edge].spec == made.spec else f'; one quantizer for the tensor: {reason}'
            reason = own[edge].reason + shared
        note(edge[0], made.entry, made.path, reason)
    behind = {made.entry: made.path for made in placed.values()}
    behind.update((entry, groups[group]) for entry, group in passed.items())
    for wish in plan.wishes:
        entry, out = wish.entry._replace(version=0), Entry(wish.reader)
        if (wish.reader, wish.slot) in placed:
            continue
        if entry in refused:
            note(wish.reader, entry, None, refused[entry])
        elif entry in passed:
            note(wish.reader, entry, behind[entry], f'{wish.reason}; {entry.node.op} passes it through')
        else:
            note(wish.reader, entry, behind.get(out), f'{wish.reason}; {wish.reader.op} runs on codes as on values, so '
                 'the quantizer stands behind it')
    return [decision for decision in plan.decisions if decision.node not in quantized] + found
