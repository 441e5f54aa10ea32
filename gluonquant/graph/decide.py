"""What each operator of a graph asks for, and why."""
from collections import Counter
from dataclasses import replace

from ..config import matches
from ..grid import check_bits
from ..plan import end_config, settle_sign, start
from ..registry import nearest
from ..symbol_graph import VARIABLE, ancestors, canonical
from ..trace import LAYER_OPS, decisions, last_layers, moves, nonnegative
from .names import bound_variable
from .net import Decision
from .place import Wish


class Plan:
    """What every operator asks for, and why.

    Parameters
    ----------
    found : Source
    base : LayerConfig
    first_last_bits, ops, skip, only : as for `attach`
    exclude : list of str.  rules : list of Rule
    ends : set of Node, optional
        The first and the last layers, if the graph itself does not tell.
    above : str
        The path of the graph in a net, which patterns begin with.

    Attributes
    ----------
    wishes, weights : list of Wish, for activations and for weights
    decisions : list of Decision, about what stays float whatever others ask for
    paths : dict, {node: its name as users read it}
    names : dict, {node: [what patterns may call it]}
    twins : dict, see `Graph.twins`
    """

    def __init__(self, found, base, first_last_bits=8, ops=LAYER_OPS, skip=None, only=None, exclude=(), rules=(),
                 ends=None, above=''):
        self.source, self.graph, self.base = found, found.graph, base
        self.nodes = [node for node in self.graph.nodes() if node.op != VARIABLE]
        self.label = found.label
        self.paths = {node: found.path(node) for node in self.nodes}
        self.ops = {_operator(name, 'ops') for name in ([ops] if isinstance(ops, str) else ops)}
        self.exclude, self.rules = exclude, rules
        self.names = {node: called(found, node, above) for node in self.nodes}
        self.first_last_bits = None if first_last_bits is None else check_bits(first_last_bits, 'first_last_bits')
        self.skip, self.only = (_counts(value, name, self.nodes) for value, name in ((skip, 'skip'), (only, 'only')))
        self.nonnegative = nonnegative(self.graph)
        self.twins = self.graph.twins()
        self.ends = self._find_ends() if ends is None else ends
        self.deciding, self.inferred = decisions(self.graph), self._find_inferred()
        self.scalars = {}
        self.moving = self._moving({*found.inputs, *(found.training[0] if isinstance(found.training, tuple) else ())})
        self.wishes, self.weights, self.decisions = [], [], []

    def _moving(self, inputs):
        """Nodes whose value depends on the net's inputs, or on chance."""
        moving = set()
        for node in self.graph.nodes():
            if node.name in inputs or any(entry.node in moving for entry in moves(node)) or \
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
        seen, numbers = Counter(), {}
        for node in self.nodes:
            twin = self.twins.get(node, node)
            if twin is node or twin.op != node.op:
                seen[node.op] += node.op in self.ops
                numbers[node] = seen[node.op]
            else:
                numbers[node] = numbers[twin]
            reason = self._refusal(node, numbers[node])
            if reason is None:
                self._wish(node, *self._config(node))
            else:
                self.decisions.append(Decision(self.paths[node], node.op, '', None, reason))

    def _find_ends(self):
        ends = {*[node for node in self.nodes if node.op in LAYER_OPS][:1], *last_layers(self.graph)}
        return ends | {node for node, twin in self.twins.items() if twin in ends}

    def _find_inferred(self):
        """The nodes that run in inference."""
        heads, training = self.graph.heads.inputs, self.source.training
        return set(ancestors(heads[:len(heads) - (training.heads if isinstance(training, tuple) else 0)]))

    def _matches(self, pattern, node):
        return any(matches(pattern, name) for name in self.names[node])

    def _refusal(self, node, number):
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
        if node in self.ends and self.first_last_bits is None:
            return 'first or last layer, first_last_bits=None'
        if node.op in LAYER_OPS and node.inputs[1].node in self.moving:
            return 'its weight is computed from data'
        if node not in self.inferred and self.twins.get(node, self.graph.heads).op != node.op:
            return 'it runs in training only'
        if node in self.deciding:
            return 'it decodes predictions: no layer depends on it'
        return None

    def _config(self, node):
        config, why = self.base, [f'{node.op} is among ops']
        if node in self.ends:
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
            elif entry.node not in self.inferred and entry.node not in self.twins:     # nothing would calibrate it
                if node.op in LAYER_OPS and entry.node.op == VARIABLE:
                    raise ValueError(f'node {node.name!r} ({node.op}) reads {entry.node.name!r} in training, which '
                                     f'inputs={self.source.inputs} does not have: call the same tensor the same in '
                                     'inputs and in training_inputs')
                self.decisions.append(Decision(self.paths[node], node.op, self.label(entry.node), None,
                                               'nothing like it exists in inference'))
            elif config.activation.method == 'none':
                self.decisions.append(Decision(self.paths[node], node.op, self.label(entry.node), None,
                                               f"{why}; method 'none'"))
            else:
                self.wishes.append(Wish(entry, config.activation, why, node, slot))

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
        self.weights.append(Wish(node.inputs[1], spec, why, node, 1))


def called(found, node, above=''):
    """What patterns may call a node of a `Source` that stands at the path ``above`` in a net."""
    return [f'{above}.{name}' if above else name for name in (node.name, found.path(node))]


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
