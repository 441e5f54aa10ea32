"""`attach`: decide for every tensor of a graph whether and how it is quantized, and make the net that does so."""
import json
from dataclasses import asdict

from ..calibrate import set_ranges
from ..grid import check_bits
from ..layers import quantizers
from ..plan import base_config, check_patterns, read_patterns
from ..registry import nearest
from ..symbol_graph import QUANTIZE, Entry, numbered
from . import source
from .decide import Plan
from .explain import decisions_about
from .place import Placed, place, place_for
from .target import find, full_range

OPS = ('Convolution', 'FullyConnected', 'Deconvolution', 'Concat', 'Pooling', 'add_n', 'elemwise_add')


def attach(net, bits=4, *, params=None, inputs='data', training_inputs=None, shapes=None, ops=OPS, target=None,
           method=None, weight=None, activation=None, weight_bits=None, activation_bits=None, first_last_bits=8,
           exclude=(), skip=None, only=None, skip_scalars=False, rules=(), per_channel=None, signed=None,
           weight_options=None, activation_options=None, table=None, freeze_batchnorm=False):
    """Quantize the graph of a net: weights, and the tensors between operators, inside blocks too.

    The net itself does not change; it and the result share their Parameters. Calibrate, hybridize, train the result.

    Parameters
    ----------
    net : HybridBlock, Symbol, Graph or str
        A float net, or the path of a ``*-symbol.json`` file.
    bits, method, weight, activation, weight_bits, activation_bits, first_last_bits, per_channel, signed, \
    weight_options, activation_options
        As for `convert`.
    params : str or dict, optional
        With a symbol or a file: the path of a ``.params`` file, or {name: array}.
    inputs : str or sequence of str
        Names for, or of, the net's inputs.
    training_inputs : str or sequence of str, optional
        Those in training, of a block that takes others there, such as targets: ('data', 'gt_boxes', ...). What a block
        does in training is traced by itself where it is something else than in inference.
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
    found = source.read(net, params, inputs, training_inputs)
    exclude, rules = read_patterns(exclude, rules)
    plan = Plan(found, base, first_last_bits, ops, skip, only, exclude, rules)
    check_patterns(exclude, rules, dict.fromkeys(name for names in plan.names.values() for name in names), 'node')
    for name in shapes or {}:
        if name not in found.inputs:
            raise ValueError(f'shapes names {name!r}, which is no input.{nearest(name, found.inputs)}')
    if skip_scalars:
        plan.skip_scalars(found.graph.shapes(**{**found.shapes(), **(shapes or {})}))
    plan.decide()
    made = build(found, plan, target)
    if table is not None:
        set_ranges(made, table)
    if freeze_batchnorm:
        made.freeze_batchnorm()
    return made


def build(found, plan, target=None):
    """The `GraphNet` that does what ``plan`` has decided, as ``target`` (a Target or None) wants it.

    Parameters
    ----------
    found : Source, whose graph changes
    plan : Plan
    """
    graph = found.graph
    if target is None:
        places, refused, passed = place(plan.wishes, plan.twins), {}, {}
    else:
        places, refused, passed = place_for(target, graph, plan.wishes, plan.base.activation, found.label, plan.twins)

    def settle(spec, entries):
        spec = plan.sign(spec, entries)
        return full_range(spec) if target is not None and target.full_range else spec
    placed = {**_insert(graph, place(plan.weights), 'weight', lambda spec, _: spec, plan.weight_path),
              **_insert(graph, places, 'activation', settle, lambda entry: f'{plan.tensor(entry)}.output_quantizer')}
    if not placed:
        raise ValueError(f'nothing is left to quantize among the {len(plan.nodes)} operators')
    order = {plan.paths.get(node): number for number, node in enumerate(graph.nodes())}
    decisions = sorted(decisions_about(plan, placed, refused, passed), key=lambda decision: order[decision.node])
    made = found.net(decisions)
    for quantizer in quantizers(made, 'weight').values():
        if quantizer.bound is not None and quantizer.bound._data is not None:       # see convert.apply
            quantizer.bound.reset_ctx(quantizer.bound.list_ctx())
    return made


def _insert(graph, places, role, settle, path_of):
    """Put quantizers into the graph; returns {(reader, slot): Placed}.

    ``settle(spec, entries)`` completes the settings of tensors that share a quantizer, ``path_of(entry)`` names it.
    """
    groups = {}
    for found in places:
        groups.setdefault(found.group, []).append(found)
    placed, taken = {}, set()
    for group in groups.values():
        spec = settle(group[0].spec, [found.entry for found in group])
        path = next(path for path in numbered(path_of(group[0].entry)) if path not in taken)
        taken.add(path)
        described = {**asdict(spec), 'role': role}
        if role == 'weight':
            described['axis'] = described['options'].pop('axis', 0)
        text = json.dumps(described, default=lambda number: number.item())      # options may be numbers of NumPy
        for entry, wished, edges, found_group, reason in group:
            node = graph.add(QUANTIZE, path, [entry], quantizer=path, spec=text)
            for reader, slot in edges:
                graph.connect(reader, [*reader.inputs[:slot], Entry(node), *reader.inputs[slot + 1:]])
                placed[reader, slot] = Placed(entry, wished, found_group, path, reason)
    return placed
