"""`convert`: decide for every layer of a net how it is quantized, then change the net in place."""
from collections import Counter
from dataclasses import replace
from itertools import takewhile

from mxnet.gluon import Block, HybridBlock, SymbolBlock

from . import quantizers
from .config import matches
from .fuse import install, uninstall
from .graph.names import bound_variable
from .graph.nested import put, restore
from .graph.part import parts
from .grid import check_bits
from .layers import LAYERS, FoldedBatchNorm, QuantizedLayer, SharedInput, fold_layer, named_blocks
from .plan import base_config, check_patterns, end_config, read_patterns, settle_sign, start
from .trace import Reading, trace


def convert(net, bits=4, *, method=None, weight=None, activation=None, weight_bits=None, activation_bits=None,
            first_last_bits=8, exclude=(), rules=(), per_channel=None, signed=None, weight_options=None,
            activation_options=None, gradient_bits=None):
    """Quantize the layers of ``net`` in place: Conv1D/2D/3D, Conv2DTranspose and Dense.

    A SymbolBlock inside ``net``, such as the features of gluoncv's SSDs, gives place to a `graph.GraphNet` whose
    convolutions and fully connected layers are quantized. `attach` quantizes what is between layers, too.

    Load float weights before or after (then with ``allow_missing=True``); calibrate; hybridize; train.

    Parameters
    ----------
    net : Block
    bits : int
        For weights and activations, unless ``weight_bits`` or ``activation_bits`` say otherwise.
    method : str, optional
        A preset for both roles: 'int8', 'fqn', 'pact' (SAWB weights), 'dorefa', 'qil', 'gdrq', 'lsq' (default).
    weight, activation : str, optional
        Methods of one role, from ``quantizers.available(role)``; they override the preset.
    first_last_bits : int or None
        The first layer and the last ones, which no other depends on (the classifier, all heads of a detector), use
        these bits with method int8 (fqn stays fqn); None leaves them float.
    exclude : str or sequence of str
        Path patterns of layers that stay float.
    rules : sequence of Rule or dict
        Other settings by path pattern; applied in order after everything else, later ones win.
    per_channel : bool, optional
        One weight scale per output channel; None = the methods' usual choice.
    signed : bool, optional
        None: unsigned grids where the input is provably never negative (behind a ReLU), signed elsewhere.
        True: signed everywhere, as TensorRT wants it.
    weight_options, activation_options : dict, optional
        Options of the methods, as for `quantizers.create`.
    gradient_bits : int, optional
        Quantize output gradients too (DoReFa).

    Returns
    -------
    net

    Raises
    ------
    ValueError
        Bits or options a layer's method does not support, a pattern that matches nothing, no layer to convert.
    RuntimeError
        The net is already converted, or hybridized and has already run.
    TypeError
        ``net`` is not a Block.

    A failed call leaves the net as it was.
    """
    _check_net(net)
    bits = check_bits(bits)
    inner = parts(net)
    floats = _float_layers(net, inner)
    base = base_config(bits, method, (weight, weight_bits, weight_options), (activation, activation_bits,
                        activation_options), per_channel, signed, gradient_bits)
    exclude, rules = read_patterns(exclude, rules)
    check_patterns(exclude, rules, [*floats, *(name for part in inner.values() for name in part.names)], 'layer')
    readings = _readings(net, floats, inner)
    plan = {}
    ends = _first_and_last(floats, readings)
    for path, layer in floats.items():
        if any(matches(pattern, path) for pattern in exclude):
            continue
        config = base
        if path in ends:
            if first_last_bits is None:
                continue
            config = end_config(base, check_bits(first_last_bits, 'first_last_bits'))
        for rule in rules:
            if rule.matches(path):
                config = rule.apply(config, start)
        plan[path] = _settle(config, path, layer, readings[path])
    made = {path: part.quantized(base, ends, first_last_bits, exclude, rules) for path, part in inner.items()}
    made = {path: graph for path, graph in made.items() if graph is not None}
    if gradient_bits is not None and made:
        path = next(iter(made))
        raise ValueError(f'gradient_bits={gradient_bits}: {path!r} is a SymbolBlock, where no gradients are quantized. '
                         f"Keep it float with exclude=['{path}.*']")
    if not plan and not made:
        raise ValueError('exclude and first_last_bits=None leave no layer to quantize')
    return apply(net, _share_inputs(net, plan, readings), made)


def apply(net, plan, made=None):
    """Change ``net`` as ``plan`` says: {path: LayerConfig}; everything is built before anything changes.

    ``made``: {path: GraphNet} of what stands for SymbolBlocks from now on.
    """
    blocks = dict(named_blocks(net))
    built, inputs, taken = {}, {}, set()
    for path in sorted(plan, key=lambda path: plan[path].shares_input_with is not None):    # owners first
        layer, config = blocks[path], plan[path]
        try:
            weight_quantizer, input_quantizer = _build(layer, config, taken)
        except (ValueError, TypeError) as error:
            raise type(error)(f'layer {path!r} ({_describe(layer)}): {error}. Change it by a rule for this layer, or '
                              f'keep it float with exclude=[{path!r}]') from None
        if config.shares_input_with is not None:
            input_quantizer = inputs[config.shares_input_with]
        else:
            input_quantizer.where = f'{path}.input_quantizer'
        weight_quantizer.where = f'{path}.weight_quantizer'
        inputs[path] = input_quantizer
        built[path] = weight_quantizer, input_quantizer
    for path, (weight_quantizer, input_quantizer) in built.items():
        layer = blocks[path]
        if layer.weight._data is not None:      # new arrays: inference has left them in a layout that slows training
            layer.weight.reset_ctx(layer.weight.list_ctx())
        weight_quantizer.nested = input_quantizer.nested = True
        LAYERS[type(layer)].from_float(layer, plan[path], weight_quantizer, input_quantizer)
        if plan[path].batchnorm is not None:
            fold_layer(layer, blocks[plan[path].batchnorm], plan[path].fold)
    for owner in plan:
        readers = [path for path in plan if owner in (path, plan[path].shares_input_with)]
        uses = {path: plan[path].input_uses for path in readers}
        if sum(uses.values()) > 1:
            shared = SharedInput(uses)
            for path in readers:
                blocks[path].share_input(shared, path)
    for path, graph in (made or {}).items():
        put(net, path, graph)
    clear_caches(net)
    return install(net)


def undo(net):
    """Make every quantized layer of ``net`` float again."""
    uninstall(net)
    for _, block in named_blocks(net):
        if isinstance(block, (QuantizedLayer, FoldedBatchNorm)):
            block.to_float()
    restore(net)
    clear_caches(net)


def clear_caches(net):
    """Forget traced graphs, so that the next call traces the net as it is now."""
    for _, block in named_blocks(net):
        if isinstance(block, HybridBlock):
            block._clear_cached_op()


def _check_net(net):
    if not isinstance(net, Block):
        raise TypeError(f'net is a {type(net).__name__}, not a gluon Block')
    for path, block in named_blocks(net):
        if isinstance(block, QuantizedLayer):
            raise RuntimeError(f'the net is already converted: {path!r} is a {type(block).__name__}. '
                               'Convert a fresh float net instead')
        if isinstance(block, quantizers.Quantizer):
            raise RuntimeError(f'quantizers are attached already: the net has {path!r}. Convert a fresh float '
                               'net instead')
        if isinstance(block, HybridBlock) and block._cached_op is not None and not isinstance(block, SymbolBlock):
            raise RuntimeError(f'{path or "the net"!r} ({type(block).__name__}) is hybridized and has already run, '
                               'so its graph is fixed. Call net.hybridize(False), convert, then hybridize again')


def _float_layers(net, inner):
    found = {path: block for path, block in named_blocks(net) if type(block) in LAYERS}
    if not found and not inner:
        if isinstance(net, SymbolBlock):
            raise ValueError(f'{type(net).__name__} is a graph, in which no layer can change in place: use gq.attach')
        known = ', '.join(sorted(cls.__name__ for cls in LAYERS))
        raise ValueError(f'{type(net).__name__} has no layer to quantize: none of its blocks is one of {known}')
    return found


def _readings(net, floats, inner):
    """{path: Reading} of layers, those of graphs inside the net too.

    Where the net cannot be traced, in order of registration, with inputs of unknown sign.
    """
    traced = trace(net)
    weights = {path: layer.weight.name for path, layer in floats.items()}
    weights.update((path, bound_variable(nodes[0].inputs[1])) for part in inner.values()
                   for path, nodes in part.layers.items())
    owners = Counter(weights.values())
    readings = {}
    for place, (path, weight) in enumerate(weights.items()):
        reading = traced.get(weight, Reading(len(traced) + place, None, False, 0))
        if owners[weight] > 1:      # the graph cannot tell which of the layers reads what
            reading = reading._replace(tensor=None)
        readings[path] = reading
    return readings


def _first_and_last(floats, readings):
    ordered = sorted([path for path in readings if readings[path].uses] or readings,
                     key=lambda path: readings[path].order)
    last = {path for path in readings if readings[path].last}
    if not last:        # the net cannot be traced
        dense = [path for path in ordered if type(floats.get(path)).__name__ == 'Dense']
        last = {(dense or ordered)[-1]}
    return {ordered[0], *last}


def _settle(config, path, layer, reading):
    """Fill in what depends on the layer: sign of the input, granularity of the weight."""
    layout = getattr(layer, '_kwargs', {}).get('layout', 'NC')
    if not layout.startswith('NC'):
        raise ValueError(f'layer {path!r} ({_describe(layer)}) has layout {layout}; only channel-first layouts '
                         f'(NCW, NCHW, NCDHW) are supported. Keep it float with exclude=[{path!r}]')
    activation, weight = settle_sign(config.activation, reading.nonnegative), config.weight
    if not LAYERS[type(layer)].per_channel_supported(layer):
        weight = replace(weight, per_channel=False)
    return replace(config, activation=activation, weight=weight,
                   input_uses=reading.uses if reading.tensor is not None else 1)


def _share_inputs(net, plan, readings):
    """Layers of one HybridBlock that read one tensor with equal settings use the quantizer of the first of them."""
    blocks = dict(named_blocks(net))
    owners, shared = {}, {}
    for path in sorted(plan, key=lambda path: readings[path].order):
        config, tensor = plan[path], readings[path].tensor
        if tensor is not None and config.activation.method != 'none':
            owner = owners.setdefault((tensor, repr(config.activation)), path)
            # Below a plain Block each part is traced by itself, and no graph sees both readers.
            if owner != path and isinstance(blocks[_common_block(owner, path)], HybridBlock):
                config = replace(config, shares_input_with=owner)
        shared[path] = config
    return shared


def _common_block(first, second):
    """Path of the innermost block that contains both layers."""
    pairs = zip(first.split('.')[:-1], second.split('.')[:-1])
    return '.'.join(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _build(layer, config, taken):
    """The two quantizers of one layer. Names of Parameters follow the layer's, numbered where that name is taken."""
    prefix, number = layer.prefix, 0
    while prefix in taken:
        number += 1
        prefix = f'{layer.prefix}{number}_'
    taken.add(prefix)
    made = []
    for role, spec in (('weight', config.weight), ('activation', config.activation)):
        options = dict(spec.options)
        if role == 'weight':
            options['shape'] = tuple(max(size, 0) for size in layer.weight.shape)
        quantizer = quantizers.create(
            spec.method, spec.bits, role=role, signed=spec.signed, per_channel=spec.per_channel,
            axis=LAYERS[type(layer)].weight_axis if role == 'weight' else 0,
            prefix=f'{prefix}{"weight" if role == "weight" else "input"}_quantizer_', **options)
        made.append(quantizer)
    return made


def _describe(layer):
    kind = type(layer).__name__
    shape = layer.weight.shape
    if shape is None or not all(shape):
        return kind
    return f'{kind} {shape[1] * getattr(layer, "_kwargs", {}).get("num_group", 1)} -> {shape[0]}'
