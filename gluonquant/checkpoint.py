"""`save` and `load`: parameters and plan in one file; `load_weights`: what the float net has of them.

The file is a NumPy archive (.npz, never pickled): every Parameter under its structural name, and ``plan``, JSON text
with what `convert` decided for each layer. It is written beside its place and moved there when complete.
"""
import json

import numpy as np
from mxnet import nd
from mxnet.gluon import SymbolBlock, nn

from .config import PLAN_VERSION, LayerConfig
from .convert import apply, clear_caches, undo
from .files import replacing
from .graph import GraphNet, as_graph, graphs
from .layers import layers, named_blocks, quantizers
from .switches import batchnorms

_PLAN = 'plan'
_FLOAT_NAME = 'float_class'


def save(net, path):
    """Write the parameters, the state and the plan of a converted net to ``path``.

    An existing file stays until the new one is complete.

    Raises
    ------
    ValueError
        The net is not converted, or some Parameter has no value yet (it is named).
    """
    if not quantizers(net):
        raise ValueError(f'{type(net).__name__} has no quantizer: save it with net.save_parameters(path)')
    nd.waitall()        # reading does not wait for what a static graph still writes, BatchNorm's statistics too
    arrays = {}
    for name, parameter in net._collect_params_with_prefix().items():
        if parameter._data is None and not hasattr(parameter, 'prepare'):
            raise ValueError(f'Parameter {name!r} has no value yet: run one batch through the net before saving')
        arrays[name] = parameter.list_data()[0].asnumpy()
    plan = {'version': PLAN_VERSION, **(net.describe() if isinstance(net, GraphNet) else _describe(net))}
    text = json.dumps(plan, default=_plain)
    with replacing(path) as file:
        np.savez(file, **{_PLAN: np.array(text)}, **{f'p:{name}': array for name, array in arrays.items()})


def load(path, net=None, ctx=None):
    """Read what `save` wrote into ``net`` and return it.

    Parameters
    ----------
    path : str
    net : Block, optional
        The same architecture, float (it is converted as the file says; nothing else needs to be told) or already
        converted in the same way. A file of a net from `attach` holds the graph, too: it needs no net; if it is given
        the float net, the result shares its Parameters; given an attached one, it loads into that.
    ctx : Context or list of Context, optional
        Where to put Parameters that have no value yet; default: where the net has others, else cpu.

    Raises
    ------
    ValueError
        The file is damaged, not one of ours, or made from another net: the first difference is named. The net is
        then as it was.
    """
    plan, arrays = _read(path)
    if 'graph' in plan:
        return _load_graph(path, plan, arrays, net, ctx)
    if net is None:
        raise ValueError(f'{path} holds Parameters and how layers are quantized: pass the float net, too')
    return _load_layers(path, plan, arrays, net, ctx)


def load_weights(path, net, ctx=None):
    """Read the weights, biases and BatchNorm statistics of what `save` wrote into a float ``net``; returns net.

    For the next stage of a progressive schedule: `convert` or `attach` it with fewer bits, calibrate, train on.

    Parameters
    ----------
    path : str
    net : Block, the float architecture of the file
    ctx : Context or list of Context, optional
        Where to put Parameters that have no value yet; default cpu.

    Raises
    ------
    ValueError
        The file is damaged, not one of ours, or lacks a Parameter of the net (BatchNorm that was folded and merged, for
        example); ``net`` is quantized. The net is then as it was.
    """
    if quantizers(net):
        raise ValueError(f'{path}: the net must be float, but it has {next(iter(quantizers(net)))!r}. Use gq.load')
    _, arrays = _read(path)
    expected = net._collect_params_with_prefix()
    names = {parameter: name for name, parameter in expected.items() if name in arrays}
    # The file of an attached net names a Parameter that several layers share once.
    found = {name: arrays[names.get(parameter, name)] for name, parameter in expected.items()
             if names.get(parameter, name) in arrays}
    _check_parameters(path, net, found)
    _place(net, found, ctx)
    return net


def _load_layers(path, plan, arrays, net, ctx):
    try:
        classes = {name: values.pop(_FLOAT_NAME) for name, values in plan['layers'].items()}
        configs = {name: LayerConfig.from_dict(values) for name, values in plan['layers'].items()}
        frozen = set(plan['frozen_batchnorm'])
        made = _make_graphs(path, plan.get('graphs', {}), net)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    converted = layers(net)
    _check_layers(path, net, classes, configs, converted)
    before = graphs(net)
    _check_graphs(path, made, before)
    if not converted and not before:
        try:
            apply(net, configs, made)
        except (ValueError, TypeError) as error:
            raise ValueError(f'{path}: {error}') from None
    try:
        _check_parameters(path, net, arrays)
    except ValueError:
        if not converted and not before:
            undo(net)
        raise
    _place(net, arrays, ctx)
    for name, graph in before.items():
        graph.take_frozen(made[name])
    for name, block in batchnorms(net).items():
        block._kwargs['use_global_stats'] = name in frozen
    clear_caches(net)
    return net


def _make_graphs(path, described, net):
    """{path: GraphNet} of the graphs in a file, with the Parameters of what stands at their places."""
    blocks, made = dict(named_blocks(net)), {}
    for name, values in described.items():
        if not isinstance(blocks.get(name), (SymbolBlock, GraphNet)):
            found = type(blocks[name]).__name__ if name in blocks else 'nothing'
            raise ValueError(f'{path}: {name!r} is a graph in the file, but {found} in the net')
        try:
            made[name] = GraphNet.from_description(values, blocks[name]._collect_params_with_prefix())
        except ValueError as error:
            raise ValueError(f'{path}: {name}: {error}') from None
    return made


def _check_graphs(path, made, before):
    for name, graph in before.items():
        if name not in made:
            raise ValueError(f'{path}: {name!r} is quantized in the net, but float in the file')
        if graph.settings() != made[name].settings():
            raise ValueError(f'{path}: {name!r} was saved from another graph, or with other quantizers. Load into a '
                             'float net')


def _load_graph(path, plan, arrays, net, ctx):
    try:
        made = GraphNet.from_description(plan, _parameters_by_path(path, net))
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if net is not None and not isinstance(net, GraphNet):
        for name in as_graph(net, inputs=made.inputs).paths.values():
            if name not in made.paths.values():
                raise ValueError(f'{path}: Parameter {name!r} of the net is missing in the graph')
    _check_parameters(path, made, arrays)
    if isinstance(net, GraphNet):
        if net.settings() != made.settings():
            raise ValueError(f'{path}: was saved from another graph, or with other quantizers')
        net.take_frozen(made)
        made = net
    _place(made, arrays, ctx)
    return made


def _parameters_by_path(path, net):
    """The Parameters that a loaded graph shares with ``net``; None if it gets its own."""
    if net is None:
        return None
    if isinstance(net, GraphNet):
        return dict(net._reg_params)
    if layers(net):
        raise ValueError(f'{path}: holds a graph, but the net is converted: pass the float net, or none')
    return net._collect_params_with_prefix()


def _place(net, arrays, ctx):
    parameters = net._collect_params_with_prefix()
    if ctx is None:     # where the net is
        ctx = next((parameter.list_ctx() for parameter in parameters.values() if parameter._data is not None), None)
    for name, parameter in parameters.items():
        placed = parameter._data is not None or parameter._deferred_init
        parameter.shape = arrays[name].shape        # Gluon does not note it for one of a graph
        parameter._load_init(nd.array(arrays[name], dtype=arrays[name].dtype), None if placed else ctx)


def _describe(net):
    """What `convert` decided, and which BatchNorm layers are frozen."""
    return {'frozen_batchnorm': [name for name, block in batchnorms(net).items() if block._kwargs['use_global_stats']],
            'layers': {name: {_FLOAT_NAME: layer.float_class.__name__, **layer.config.to_dict()}
                       for name, layer in layers(net).items()},
            'graphs': {name: graph.describe() for name, graph in graphs(net).items()}}


def _plain(value):
    """NumPy scalars among the options, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f'the option {value!r} cannot be saved: pass numbers, strings, lists or dicts')


def _read(path):
    """(plan, arrays by name of Parameter)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if _PLAN not in archive:
                raise ValueError('no plan inside, so this is not a file of gq.save')
            plan = json.loads(str(archive[_PLAN]))
            arrays = {name[2:]: archive[name] for name in archive.files if name.startswith('p:')}
        if plan['version'] != PLAN_VERSION:
            raise ValueError(f'plan version {plan["version"]}, this library reads {PLAN_VERSION}')
        return plan, arrays
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:      # damaged bytes fail wherever they are first made sense of
        known = isinstance(error, ValueError) and str(error).startswith(('no plan', 'plan version'))
        raise (ValueError(f'{path}: {error}') if known else _damaged(path, error)) from None


def _damaged(path, error):
    return ValueError(f'{path}: not a complete file of gq.save ({type(error).__name__}: {error})')


def _check_layers(path, net, classes, configs, converted):
    blocks = dict(named_blocks(net))
    for name, float_class in classes.items():
        found = type(blocks[name]).__name__ if name in blocks else 'nothing'
        if name in converted:
            found = converted[name].float_class.__name__
            if converted[name].config != configs[name]:
                raise ValueError(f'{path}: layer {name!r} was saved as {configs[name]}, the net has '
                                 f'{converted[name].config}. Load into a float net')
        norm = configs[name].batchnorm
        if norm is not None and not isinstance(blocks.get(norm), nn.BatchNorm):
            raise ValueError(f'{path}: the file has the BatchNorm {norm!r} folded into {name!r}, the net has '
                             f'{type(blocks[norm]).__name__ if norm in blocks else "nothing"} there')
        if found != float_class:
            raise ValueError(f'{path}: layer {name!r} is a {float_class} in the file, but {found} in the net')
    extra = [name for name in converted if name not in classes]
    if extra:
        raise ValueError(f'{path}: layer {extra[0]!r} is quantized in the net, but float in the file')


def _check_parameters(path, net, arrays):
    expected = net._collect_params_with_prefix()
    for name in [*expected, *arrays]:
        if name not in arrays:
            raise ValueError(f'{path}: Parameter {name!r} of the net is missing in the file')
        if name not in expected:
            raise ValueError(f'{path}: Parameter {name!r} of the file is missing in the net')
        saved = arrays[name].shape
        shape = expected[name].shape or (0,) * len(saved)      # None: a graph does not know it yet
        if len(shape) != len(saved) or any(mine not in (0, -1, theirs) for mine, theirs in zip(shape, saved)):
            raise ValueError(f'{path}: Parameter {name!r} has shape {saved} in the file, but {shape} in the net')
        if np.dtype(expected[name].dtype) != arrays[name].dtype:
            raise ValueError(f'{path}: Parameter {name!r} is {arrays[name].dtype} in the file, but '
                             f'{np.dtype(expected[name].dtype)} in the net; cast the net first')
