"""Which tensors get a quantizer, from what the operators that read them ask for."""
from typing import Any, List, NamedTuple, Optional

from ..symbol_graph import Entry, Node
from ..trace import LAYER_OPS
from .target import passes

SUMS = ('elemwise_add', 'broadcast_add', 'add_n')


class Wish(NamedTuple):
    """``reader`` asks for the tensor ``entry``, its input number ``slot``, on the grid of ``spec``, for a reason.

    Without a reader, the tensor is to be quantized whoever reads it.
    """
    entry: Entry
    spec: Any
    reason: str
    reader: Optional[Node] = None
    slot: int = 0


class Place(NamedTuple):
    """A quantizer of ``spec`` behind ``entry``, for the (reader, slot) pairs of ``edges``.

    Places with the same ``group`` share one quantizer.
    """
    entry: Entry
    spec: Any
    edges: List
    group: Entry
    reason: str


class Placed(NamedTuple):
    """A quantizer in the graph: what it reads, what was asked for, which group it serves, its path in the net."""
    entry: Entry
    spec: Any
    group: Entry
    path: str
    reason: str


def place(wishes, twins=None):
    """One `Place` for each tensor that is wished for; the widest grid wins where readers differ.

    ``twins``: {node: node}; their tensors, which are one in inference and in training, share a quantizer.
    """
    places, twins = [], twins or {}
    for entry, asked in _by_tensor(wishes).items():
        spec, why = _widest(asked)
        group = entry._replace(node=twins.get(entry.node, entry.node))
        places.append(Place(entry, spec, [(wish.reader, wish.slot) for wish in asked], group, why))
    return places


def place_for(target, graph, wishes, base, label, twins):
    """`place` as ``target`` wants it.

    Parameters
    ----------
    target : Target
    graph : Graph
    wishes : list of Wish
    base : QuantizerSpec, of outputs that are quantized for the target's sake
    label : callable(node), its name for messages
    twins : dict, as for `place`

    Returns
    -------
    (list of Place, dict, dict)
        The first dict gives the reasons why tensors {entry: reason} get no quantizer in spite of a wish; the second
        tells which tensors {entry: group} need none because they lie on the grid of a group already.
    """
    nodes = graph.nodes()
    refused = {}
    wishes = [moved for wish in wishes for moved in _moved(target, wish)]
    if target.sums == 'shortcut':
        wishes = _without_fused_sums(target, graph, wishes, refused, label)
    if target.outputs and base.method != 'none':
        wishes += _outputs(target, graph, wishes, base, label)
    region = _regions(target, nodes, twins)
    asked = _by_tensor(wishes)
    settings = {}
    for entry, own in asked.items():
        settings.setdefault(region(entry), []).extend(own)
    settings = {root: _widest(own) for root, own in settings.items()}
    places, passed, quantized = [], {}, set()
    for node in nodes:
        carried = _carried(target, node)
        on_grid = bool(carried) and all(entry[:2] in quantized for entry in carried)
        for entry in _read_outputs(graph, node):
            if on_grid:
                quantized.add(entry[:2])
                passed[entry] = region(entry)
            elif entry in asked:
                quantized.add(entry[:2])
                spec, why = settings[region(entry)]
                edges = [(reader, slot) for reader in dict.fromkeys(graph.readers(node)) if reader is not graph.heads
                         for slot, other in enumerate(reader.inputs) if other[:2] == entry[:2]]
                places.append(Place(entry, spec, edges, region(entry), asked[entry][0].reason if
                                    asked[entry][0].spec == spec else why))
    return places, refused, passed


def _by_tensor(wishes):
    found = {}
    for wish in wishes:
        found.setdefault(wish.entry._replace(version=0), []).append(wish)
    return found


def _widest(wishes):
    """(spec, reason) of the wish for most bits, the first of them."""
    best = max(wishes, key=lambda wish: wish.spec.bits)
    others = {wish.spec.bits for wish in wishes} - {best.spec.bits}
    why = f'; others that read it ask for {min(others)} bits' if others else ''
    return best.spec, best.reason + why


def _carried(target, node):
    """The inputs on whose common grid the output of ``node`` lies, if they share one: [] if it computes new values."""
    if passes(node):
        return node.inputs[:1]
    return node.inputs if node.op == 'Concat' and node.op in target.equal else []


def _read_outputs(graph, node):
    """The outputs of ``node`` that something reads."""
    found = {entry.index for reader in graph.readers(node) for entry in reader.inputs if entry.node is node}
    return [Entry(node, index) for index in sorted(found)]


def _moved(target, wish):
    """What an operator that passes quantizers through asks for its input, it can have of its outputs."""
    if wish.reader is None or not _carried(target, wish.reader):
        return [wish]
    how = 'all its inputs on one scale: ' if wish.reader.op == 'Concat' else ''
    return [Wish(Entry(wish.reader), wish.spec, f'{wish.reason}; {how}{wish.reader.op} runs on codes as on values, so '
                 'the quantizer stands behind it')]


def _without_fused_sums(target, graph, wishes, refused, label):
    order = {node: number for number, node in enumerate(graph.nodes())}
    dropped = set()
    for node in {wish.reader for wish in wishes if wish.reader is not None and wish.reader.op in SUMS}:
        made = {entry: layer for entry in node.inputs for layer in [_layer_before(graph, entry)] if layer is not None}
        if made:
            fused = max(made, key=lambda entry: order[made[entry]])
            dropped.add((node, fused[:2]))
            refused[fused] = (f'{target.name} computes the sum {label(node)!r} together with {label(made[fused])!r}, '
                              'which makes this input, and only the shortcut is stored')
    return [wish for wish in wishes if (wish.reader, wish.entry[:2]) not in dropped]


def _layer_before(graph, entry):
    """The layer that ``entry`` is the output of, directly or behind BatchNorm, if nothing else reads it."""
    while len(graph.readers(entry.node)) == 1:
        if entry.node.op in LAYER_OPS:
            return entry.node
        if entry.node.op != 'BatchNorm':
            return None
        entry = entry.node.inputs[0]
    return None


def _outputs(target, graph, wishes, base, label):
    """Wishes for the outputs of operators that wish for inputs, where further integer operators depend on them."""
    integer = {wish.reader for wish in wishes if wish.reader is not None}
    nodes, before = graph.nodes(), set(integer)
    for node in reversed(nodes):
        if any(reader in before for reader in graph.readers(node)):
            before.add(node)
    found = []
    for node in nodes:
        if node not in integer:
            continue
        entry = Entry(node)
        while True:     # what the engine does in one go with the operator, or on codes, comes before the quantizer
            readers = graph.readers(entry.node)
            if len(readers) != 1 or not (readers[0].op == 'BatchNorm' and entry.node.op in LAYER_OPS or
                                         _is_relu(readers[0]) or _carried(target, readers[0])):
                break
            entry = Entry(readers[0])
        if any(reader in before for reader in graph.readers(entry.node)):
            found.append(Wish(entry, base, f'{target.name} computes {label(node)!r} in integers if its output is on a '
                              'grid'))
    return found


def _is_relu(node):
    return node.op == 'relu' or (node.op == 'Activation' and node.attrs.get('act_type') == 'relu') or \
        (node.op == 'clip' and float(node.attrs['a_min']) == 0)


def _regions(target, nodes, twins):
    """A function that maps tensors of one common grid to the same tensor."""
    parent = {}

    def root(entry):
        entry = top = entry._replace(version=0)
        while top in parent:
            top = parent[top]
        while entry != top:     # shortens the way for the next time
            parent[entry], entry = top, parent[entry]
        return top

    def join(first, second):
        first, second = root(first), root(second)
        if first != second:
            parent[second] = first
    for node, twin in twins.items():
        for index in range(max(1, _split(node))):
            join(Entry(twin, index), Entry(node, index))
    for node in nodes:
        for entry in _carried(target, node):
            join(node.inputs[0], entry)
            for index in range(_split(node)):
                join(node.inputs[0], Entry(node, index))
        if node.op in target.equal and node.op != 'Concat':
            for entry in node.inputs[1:]:
                join(node.inputs[0], entry)
    return root


def _split(node):
    return int(node.attrs.get('num_outputs', 1)) if node.op == 'SliceChannel' else 1
