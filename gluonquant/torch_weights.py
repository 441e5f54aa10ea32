"""`load_torch`: pretrained float weights from files of torch, torchvision and timm.

A state dict names tensors. It says neither in which order layers run (safetensors files are sorted by name) nor what
they do. The names tell the order: they are paths in a tree of modules, and `_CHILDREN` has the children of each kind of
module that torchvision's and timm's ResNets and MobileNets consist of. Gluon's blocks are registered as they run. The
two sequences must agree in every layer's tensors and shapes; then values go from one to the other.
"""
import os
from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
from mxnet import MXNetError, nd
from mxnet.gluon import Block, nn
from mxnet.gluon.model_zoo.vision.mobilenet import RELU6

from .convert import clear_caches
from .layers import named_blocks, quantizers
from .trace import traced

_CHILDREN = [line.split() for line in (                                 # in the order in which they run
    'module', 'model', '_orig_mod',                                     # wrappers
    'conv1 bn1 layer1 layer2 layer3 layer4 fc',                         # ResNets
    'conv1 bn1 conv2 bn2 conv3 bn3 downsample',
    'features classifier', 'conv', 'block', 'fc1 fc2',                  # torchvision's MobileNets
    'conv_stem bn1 blocks conv_head bn2 classifier',                    # timm's
    'conv_dw bn1 se conv_pw bn2', 'conv_pw bn1 conv_dw bn2 se conv_pwl bn3', 'conv bn1', 'conv_reduce conv_expand')]
_CONTAINERS = ('state_dict', 'model_state_dict', 'model')
_BATCHNORM = {'weight': 'gamma', 'bias': 'beta'}
_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'I64': np.int64}


def load_torch(source, net, ctx=None, *, eps=None, skip_head=False):
    """Set the Parameters of a float ``net`` from weights of the same architecture in torch, and return it.

    In inference the outputs are those of the torch net, to the rounding of float32, for

    =======================================  ==================================================
    gluoncv                                  torch
    =======================================  ==================================================
    resnet18_v1b, 34, 50, 101, 152; 18_v1    torchvision's and timm's resnet18, 34, 50, 101, 152
    resnet50_v1c, _v1d, _v1s, 101, 152       timm's resnet50c, d, s, 101, 152
    mobilenet1.0                             timm's mobilenetv1_100
    mobilenetv2_1.0                          torchvision's mobilenet_v2, timm's mobilenetv2_100
    mobilenetv3_large, mobilenetv3_small     torchvision's mobilenet_v3_*, timm's mobilenetv3_*_100
    =======================================  ==================================================

    Strides, paddings and activations are in no file. Any net whose layers agree in order and shapes is filled; that its
    operations agree, too, the caller has to know. timm's ``tf_*`` (padding on one side) and ``resnetblur*`` (blurring)
    look like the above, but do not agree with Gluon's nets. What differs above is treated:

    - MobileNetV2 and V3 of gluoncv lack biases behind the last BatchNorm, and timm's MobileNetV1 clips at 6: the net
      changes as `like_torch` describes.
    - mobilenetv3_small of gluoncv has 1280 units before its last layer, torch's 1024: the others compute zero.
    - mobilenet_v2 of MXNet's own zoo expands in its first bottleneck: that becomes the identity.
    - BatchNorm's eps: running_var becomes running_var + eps - Gluon's eps.

    Parameters
    ----------
    source : str or path, or mapping from name to tensor
        A ``.safetensors`` file (read by ``safetensors``), a ``.pth``, ``.pt``, ``.bin`` or ``.tar`` file (by ``torch``,
        which is told to unpickle tensors only), or a state dict of arrays or torch tensors. It may stand under
        'state_dict', 'model_state_dict' or 'model', its names behind 'module.'. Every float dtype is cast to that of
        the Parameter. gluoncv cannot be imported where torch 2 is installed: write .safetensors there.
    net : HybridBlock, float, initialized or not
    ctx : Context or list of Context, optional
        Where to put Parameters that have no value yet; default cpu.
    eps : float, optional
        Of torch's BatchNorm. Default: 1e-3 for torchvision's MobileNetV3, else 1e-5.
    skip_head : bool
        Leave the last layer as it is, for another number of classes. If it has no value yet, initialize it afterwards.

    Raises
    ------
    ValueError
        The net is converted; the file is damaged or of another kind; the names are none of these families'; or the
        layers differ: the first that does is named, with both shapes. The net is then as it was.
    ImportError
        The package that reads the file is missing.

    References: the definitions of these nets in torchvision, timm and gluoncv 0.10.5.
    """
    if not isinstance(net, Block):
        raise TypeError(f'net is a {type(net).__name__}, not a gluon Block')
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(f'source is a {type(source).__name__}, neither a path nor a mapping from name to tensor')
    if quantizers(net):
        raise ValueError('the net is converted: load into the float net, then convert it')
    where = 'the state dict' if isinstance(source, Mapping) else str(source)
    theirs = _in_order(where, _arrays(where, source))
    if eps is None:
        eps = 1e-3 if any('.block.' in f'.{name}.' for name, _ in theirs) else 1e-5
    mine = [(name, block) for name, block in named_blocks(net) if block._reg_params]
    theirs = _completed(net, mine, theirs, eps)
    if skip_head:       # torch's last layer is linear; a file of features alone ends before it
        mine, theirs = mine[:-1], theirs[:-1] if np.ndim(theirs[-1][1].get('weight')) == 2 else theirs
    matched = _matched(where, net, mine, theirs, eps)
    like_torch(net)
    for block, arrays in matched:
        for name, array in arrays.items():
            parameter = block._reg_params[name]
            placed = parameter._data is not None or parameter._deferred_init
            parameter._load_init(nd.array(array, dtype=parameter.dtype), None if placed else ctx)
    return net


def like_torch(net):
    """Change ``net`` in place to what torch computes, as `load_torch` does, and return it.

    Convolutions and Dense layers behind the last BatchNorm get a bias, zero at first; in a MobileNet (the first), ReLU
    becomes ReLU6. Other nets stay as they are. A net that `load_torch` has filled is built again by this:

        net = gq.load(path, gq.like_torch(get_model('mobilenetv2_1.0')))
    """
    for block in _without_bias(net):
        weight = block.weight
        block.bias = block.params.get('bias', shape=weight.shape[:1], dtype=weight.dtype, init='zeros')
        if weight._data is not None or weight._deferred_init:
            block.bias.initialize(ctx=weight.list_ctx())
        if isinstance(block, nn.Conv2D):
            block._kwargs['no_bias'] = False
    if _is(net, 'MobileNet'):
        for name, child in net.features._children.items():
            if isinstance(child, nn.Activation) and child._act_type == 'relu':
                net.features._children[name] = RELU6(prefix=child.prefix)
    clear_caches(net)
    return net


def _is(net, name):
    """Whether ``net`` is of the class of this name: gluoncv and MXNet have each their own."""
    return any(kind.__name__ == name for kind in type(net).__mro__)


def _without_bias(net):
    """The layers behind the last BatchNorm that have none."""
    found = None
    for _, block in named_blocks(net):
        if isinstance(block, nn.BatchNorm):
            found = []
        elif found is not None and isinstance(block, (nn.Conv2D, nn.Dense)) and block.bias is None:
            found.append(block)
    return found or []


def _arrays(where, source):
    """{name: float array} of what ``source`` holds."""
    state = source
    if not isinstance(source, Mapping):
        readers = {'.safetensors': _read_safetensors, **dict.fromkeys(('.pth', '.pt', '.bin', '.tar'), _read_torch)}
        suffix = Path(source).suffix.lower()
        if suffix not in readers:
            raise ValueError(f'{where}: the name ends in {suffix!r}, known are {", ".join(readers)}')
        state = readers[suffix](where)
    for key in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not (isinstance(state, Mapping) and state):
        raise ValueError(f'{where} holds no tensors, but a {type(state).__name__}: save the net\'s state dict')
    for name, value in state.items():
        if not hasattr(value, 'shape'):
            raise ValueError(f'{where}: {name!r} is a {type(value).__name__}, not a tensor: pass the state dict alone')
    return {name: _array(value) for name, value in state.items() if not name.endswith('num_batches_tracked')}


def _array(value):
    """float32 of what NumPy, MXNet or torch have (NumPy knows no bfloat16)."""
    if hasattr(value, 'asnumpy'):
        value = value.asnumpy()
    elif hasattr(value, 'detach'):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise ImportError(f'{path}: to read it, pip install safetensors') from None
    try:
        tensors = deserialize(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f'{path}: not a complete safetensors file ({error})') from None
    state = {}
    for name, tensor in tensors:
        if tensor['dtype'] == 'BF16':       # the upper half of float32
            array = (np.frombuffer(tensor['data'], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif tensor['dtype'] in _DTYPES:
            array = np.frombuffer(tensor['data'], _DTYPES[tensor['dtype']])
        else:
            raise ValueError(f'{path}: {name!r} is of dtype {tensor["dtype"]}, known are BF16, {", ".join(_DTYPES)}')
        state[name] = array.reshape(tensor['shape'])
    return state


def _read_torch(path):
    try:
        import torch
    except ImportError:
        raise ImportError(f'{path}: to read it, pip install torch; or save the state dict where torch is by '
                          'safetensors.torch.save_file, which needs no torch here') from None
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:      # pickle, zip and torch fail each in its way
        raise ValueError(f'{path}: torch cannot read it as tensors alone ({type(error).__name__}: {error})') from None


def _in_order(where, arrays):
    """[(name of a layer, {name of a Parameter: array})] as the layers run."""
    layers, children = defaultdict(dict), defaultdict(set)
    for name, array in arrays.items():
        *path, tensor = name.split('.')
        layers[tuple(path)][tensor] = array
        for depth, child in enumerate(path):
            children[tuple(path[:depth])].add(child)
    places = {}
    for path, names in children.items():
        numbered = all(name.isdigit() for name in names)
        places[path] = sorted(names, key=int) if numbered else next((row for row in _CHILDREN if names <= {*row}), None)
        if places[path] is None:
            raise ValueError(f'{where}: it is not known in which order {", ".join(sorted(names))} run in '
                             f'{".".join(path) or "the net"!r}. Known are the ResNets and MobileNets of torchvision '
                             'and timm')
    ordered = sorted(layers, key=lambda path: [places[path[:depth]].index(child) for depth, child in enumerate(path)])
    return [('.'.join(path), {_BATCHNORM[key] if 'running_var' in layers[path] and key in _BATCHNORM else key: array
                              for key, array in layers[path].items()}) for path in ordered]


def _completed(net, mine, theirs, eps):
    """``theirs``, and what only Gluon has: an expansion that is the identity, hidden units that are zero."""
    theirs = list(theirs)
    if _is(net, 'MobileNetV2') and len(mine) == len(theirs) + 2:
        n = mine[0][1].weight.shape[0]
        theirs[2:2] = [('the identity', {'weight': np.eye(n).reshape(n, n, 1, 1)}),
                       ('the identity', {'gamma': np.ones(n), 'beta': np.zeros(n), 'running_mean': np.zeros(n),
                                         'running_var': np.full(n, 1 - eps)})]
    if _is(net, '_MobileNetV3') and len(mine) == len(theirs):
        (name, hidden), (last_name, last) = theirs[-2:]
        more = mine[-2][1].weight.shape[0] - len(hidden.get('weight', ()))
        if more > 0 and {*hidden, *last} == {'weight', 'bias'} and last['weight'].ndim == 2:
            theirs[-2:] = [(name, {key: np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1))
                                   for key, array in hidden.items()}),
                           (last_name, {**last, 'weight': np.pad(last['weight'], [(0, 0), (0, more)])})]
    return theirs


def _matched(where, net, mine, theirs, eps):
    """[(block, {name of a Parameter: array})]; ValueError for the first layer that does not agree."""
    channels = theirs[0][1]['weight'].shape[1] if theirs and np.ndim(theirs[0][1].get('weight')) > 1 else 3
    shapes, without_bias, matched = _shapes(where, net, (1, channels, 224, 224)), _without_bias(net), []
    for (name, block), (torch_name, arrays) in zip_longest(mine, theirs, fillvalue=('', {})):
        expected = {key: shapes.get(one.name, one.shape) for key, one in block._reg_params.items()} if block else {}
        arrays = dict(arrays)
        if block in without_bias:
            expected['bias'] = expected['weight'][:1]
            arrays.setdefault('bias', np.zeros(expected['bias'], np.float32))
        if np.ndim(arrays.get('weight')) == 2 and expected.get('weight', ())[2:] == (1, 1):
            arrays['weight'] = arrays['weight'][:, :, None, None]       # a linear layer as a convolution
        found = {key: array.shape for key, array in arrays.items()}
        if found != expected:
            head = len(matched) + 1 == len(mine) == len(theirs) and 'weight' in found
            raise ValueError(f'{where}: layer {name!r} of the net has {_spell(expected)}, but its counterpart '
                             f'{torch_name!r} has {_spell(found)}.' + head * (
                                 ' For other classes pass skip_head=True, or build the net with as many'))
        if 'running_var' in arrays:
            arrays['running_var'] = arrays['running_var'] + (eps - block._kwargs['eps'])
            if block._kwargs['fix_gamma'] and np.any(arrays['gamma'] != 1):
                raise ValueError(f'{where}: BatchNorm {name!r} of the net has scale=False, but {torch_name!r} scales')
        matched.append((block, arrays))
    return matched


def _shapes(where, net, image):
    """{name of a Parameter: shape} that an image implies, also where the net has not seen one yet."""
    graph, error = traced(net)
    if graph is None:
        raise ValueError(f'the net cannot be traced ({error})')
    symbol = graph.symbol()
    try:
        arguments, _, states = symbol.infer_shape_partial(data=image)
    except MXNetError as error:
        raise ValueError(f'{where}: the net does not take images of shape {image}: {error}') from None
    return dict(zip(symbol.list_arguments() + symbol.list_auxiliary_states(), arguments + states))


def _spell(shapes):
    return ', '.join(f'{name} {shape}' for name, shape in shapes.items()) or 'nothing'
