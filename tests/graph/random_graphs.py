"""Hypothesis strategy: small random symbols, valid by construction, with Parameters and the shapes of their inputs."""
import json
import math
from typing import Any, Dict, NamedTuple, Tuple

import mxnet as mx
import numpy as np
from hypothesis import strategies as st
from mxnet import nd

SHAPE = (2, 4, 8, 8)
LARGEST = 16        # height and width


class RandomGraph(NamedTuple):
    """A symbol, {name: NDArray} of its Parameters and states, and {name: shape} of its inputs."""
    symbol: Any
    params: Dict[str, Any]
    shapes: Dict[str, Tuple[int, ...]]

    def __repr__(self):
        """A line for each operator, so that a failing example can be read."""
        nodes = json.loads(self.symbol.tojson(remove_amp_cast=False))
        names = [node['name'] for node in nodes['nodes']]

        def read(edges):
            return ', '.join(names[number] + (f'[{index}]' if index else '') for number, index, _ in edges)
        lines = [f'  {node["name"]} = {node["op"]}({read(node["inputs"])}) {node.get("attrs", "")}'
                 for node in nodes['nodes'] if node['op'] != 'null']
        return '\n'.join([f'RandomGraph({self.shapes})', *lines, f'  return {read(nodes["heads"])}'])

    def inputs(self, seed=0):
        """A tensor for each input, in order."""
        rng = np.random.default_rng(seed)
        return [nd.array(rng.normal(size=shape)) for shape in self.shapes.values()]


class Tensor(NamedTuple):
    symbol: Any
    shape: Tuple[int, ...]


class Layer(NamedTuple):
    """Settings and Parameters of a convolution that another one may share."""
    channels: int
    options: Dict[str, Any]
    parameters: Dict[str, Any]


class _Builder:
    """Grows a graph: every method but `heads` adds an operator to ``self.tensors``, whatever they are by now."""

    def __init__(self, draw, global_average):
        self.draw = draw
        self.global_average = global_average
        self.shapes = {'data': SHAPE}
        if draw(st.booleans()):
            self.shapes['other'] = SHAPE
        self.tensors = [Tensor(mx.sym.var(name), shape) for name, shape in self.shapes.items()]
        self.layers = []
        self.count = 0

    def name(self, kind):
        self.count += 1
        return f'{kind}{self.count}'

    def pick(self, *values):
        return self.draw(st.sampled_from(values))

    def tensor(self, fits=lambda tensor: True):
        """One of the tensors that fit, rather a late one; None if there is none."""
        found = [tensor for tensor in reversed(self.tensors) if fits(tensor)]
        return found[min(self.pick(0, 0, 0, 1, 2, 4, 8), len(found) - 1)] if found else None

    def several(self, like, alike, most):
        """One to ``most`` tensors like ``like`` by ``alike(shape)``, among them perhaps ``like`` itself."""
        found = [tensor for tensor in self.tensors if alike(tensor.shape) == alike(like.shape)]
        return self.draw(st.lists(st.sampled_from(found), min_size=1, max_size=most))

    def add(self, symbol):
        """Keep the outputs of an operator."""
        shapes = symbol.infer_shape(**read(symbol, self.shapes))[1]
        made = [Tensor(symbol[index], shape) for index, shape in enumerate(shapes)]
        self.tensors += made
        return made[0]

    def grow(self):
        self.draw(st.sampled_from([
            self.convolution, self.convolution, self.convolution, self.norm, self.norm, self.activation,
            self.activation, self.sum, self.sum, self.sums, self.broadcast, self.concat, self.pooling, self.pooling,
            self.split, self.deconvolution, self.dropout, self.move, self.number, self.again]))()

    def convolution(self):
        x = self.tensor()
        channels = x.shape[1]
        groups = self.pick(1, 1, *(size for size in (2, channels) if channels % size == 0))
        # MXNet's one-dimensional kernels on maps take one size per axis.
        kernel = (self.pick(1, 3), self.pick(1, 3))
        options = {'kernel': kernel, 'num_filter': groups * self.pick(1, 2, 4), 'num_group': groups,
                   'no_bias': self.pick(True, False)}
        name = self.name('conv')
        parameters = {'weight': mx.sym.var(f'{name}_weight')}
        if not options['no_bias']:
            parameters['bias'] = mx.sym.var(f'{name}_bias')
        self.layers.append(Layer(channels, options, parameters))
        self.add(mx.sym.Convolution(x.symbol, name=name, **options, **parameters, **self.window(x, kernel)))

    def again(self):
        """A convolution with the Parameters of an earlier one."""
        layer = self.draw(st.sampled_from(self.layers)) if self.layers else None
        x = layer and self.tensor(lambda tensor: tensor.shape[1] == layer.channels)
        if x:
            self.add(mx.sym.Convolution(x.symbol, name=self.name('conv'), **layer.options, **layer.parameters,
                                        **self.window(x, layer.options['kernel'])))

    def window(self, x, kernel):
        """Stride, padding and dilation with which ``kernel`` fits onto x."""
        stride, pad, dilate = [], [], []
        for size, length in zip(kernel, x.shape[2:]):
            apart = self.pick(1, 2) if size > 1 else 1
            reach = apart * (size - 1) + 1
            least = max(0, math.ceil((reach - length) / 2))
            dilate.append(apart)
            pad.append(least + (self.pick(0, 1) if size > 1 else 0))
            stride.append(self.pick(1, 1, 2))
        return {'stride': tuple(stride), 'pad': tuple(pad), 'dilate': tuple(dilate)}

    def deconvolution(self):
        x = self.tensor(lambda tensor: max(tensor.shape[2:]) <= LARGEST // 2)
        if x:
            groups = self.pick(1, 1, *(size for size in (2,) if x.shape[1] % size == 0))
            size = self.pick(2, 3)
            self.add(mx.sym.Deconvolution(x.symbol, kernel=(size, size), stride=(self.pick(1, 2),) * 2,
                                          num_filter=groups * self.pick(1, 2), num_group=groups,
                                          no_bias=self.pick(True, False), name=self.name('deconv')))

    def norm(self):
        self.add(mx.sym.BatchNorm(self.tensor().symbol, fix_gamma=self.pick(True, False),
                                  eps=self.pick(1e-3, 1e-5), name=self.name('norm')))

    def activation(self):
        x, name = self.tensor().symbol, self.name('act')
        self.add(self.pick(
            lambda: mx.sym.relu(x, name=name), lambda: mx.sym.Activation(x, act_type='relu', name=name),
            lambda: mx.sym.clip(x, 0, 6, name=name), lambda: mx.sym.clip(x, -1, 1, name=name),
            lambda: mx.sym.sigmoid(x, name=name), lambda: mx.sym.Activation(x, act_type='tanh', name=name),
            lambda: mx.sym.LeakyReLU(x, act_type='leaky', slope=0.1, name=name))())

    def sum(self):
        x = self.tensor()
        other = self.several(x, lambda shape: shape, 1)[0]
        self.add(mx.sym.elemwise_add(x.symbol, other.symbol, name=self.name('sum')))

    def sums(self):
        x = self.tensor()
        others = self.several(x, lambda shape: shape, 3)
        self.add(mx.sym.add_n(x.symbol, *(other.symbol for other in others), name=self.name('sum')))

    def broadcast(self):
        x = self.tensor()
        name = self.name('broadcast')
        small = [tensor.symbol for tensor in self.tensors if tensor.shape == (*x.shape[:2], 1, 1)]
        other = self.pick(mx.sym.var(f'{name}_factor', shape=(1, x.shape[1], 1, 1)), *small)
        run = self.pick(mx.sym.broadcast_add, mx.sym.broadcast_mul)
        self.add(run(x.symbol, other, name=name))

    def concat(self):
        x = self.tensor(lambda tensor: tensor.shape[1] <= 8)
        if x:
            others = self.several(x, lambda shape: shape[2:], 2)
            self.add(mx.sym.Concat(x.symbol, *(other.symbol for other in others), dim=1, name=self.name('concat')))

    def pooling(self):
        x, kind = self.tensor(), self.pick('max', 'avg')
        name = self.name('pool')
        if self.pick(False, False, True):
            if kind == 'avg' and not self.global_average:
                self.add(mx.sym.mean(x.symbol, axis=(2, 3), keepdims=True, name=name))
            else:
                self.add(mx.sym.Pooling(x.symbol, pool_type=kind, global_pool=True, kernel=(1, 1), name=name))
            return
        size = self.pick(*(size for size in (1, 2, 3) if size <= min(x.shape[2:])))
        options = {'kernel': (size, size), 'pad': (self.pick(*range((size + 1) // 2)),) * 2,
                   'stride': (self.pick(1, 2),) * 2}
        self.add(mx.sym.Pooling(x.symbol, pool_type=kind, name=name, **options))

    def split(self):
        x = self.tensor(lambda tensor: tensor.shape[1] % 2 == 0)
        if x:
            self.add(mx.sym.SliceChannel(x.symbol, num_outputs=2, name=self.name('split')))

    def dropout(self):
        self.add(mx.sym.Dropout(self.tensor().symbol, p=0.3, name=self.name('dropout')))

    def move(self):
        """Values change their places only."""
        x, name = self.tensor(), self.name('move')
        _, channels, height, width = x.shape
        self.add(self.pick(
            lambda: mx.sym.transpose(x.symbol, axes=(0, 1, 3, 2), name=name),
            lambda: mx.sym.Reshape(x.symbol, shape=(0, -1, height, width), name=name),
            lambda: mx.sym.Reshape(x.symbol, shape=(0, channels, -1, 1), name=name),
            lambda: mx.sym.SwapAxis(x.symbol, dim1=2, dim2=3, name=name),
            lambda: mx.sym.slice_axis(x.symbol, axis=1, begin=0, end=max(channels // 2, 1), name=name))())

    def number(self):
        x = self.tensor().symbol
        self.add(self.pick(lambda: x * 0.5, lambda: x + 0.25, lambda: 1 - x, lambda: mx.sym.maximum(x, 0.1))())

    def heads(self):
        """One to three outputs; the first is that of a layer with a weight."""
        found = []
        for place in range(self.pick(1, 1, 2, 3)):
            x = self.tensor()
            kind = self.pick('dense', 'pooled dense', 'convolution') if not place else \
                self.pick('dense', 'tensor', 'flat', 'tensor again')
            name = self.name('head')
            if kind == 'convolution':
                made = mx.sym.Convolution(x.symbol, kernel=(1, 1), num_filter=3, name=name)
            elif kind in ('dense', 'pooled dense'):
                if kind == 'pooled dense':
                    x = Tensor(mx.sym.Pooling(x.symbol, pool_type='max', global_pool=True, kernel=(1, 1),
                                              name=f'{name}_pool'), None)
                flat = mx.sym.Flatten(x.symbol, name=f'{name}_flat')
                made = mx.sym.FullyConnected(flat, num_hidden=3, no_bias=self.pick(True, False), name=name)
            elif kind == 'flat':
                made = mx.sym.Flatten(x.symbol, name=name)
            else:
                made = x.symbol
            found.append(made)
            if kind == 'tensor again':
                found.append(made)
        return mx.sym.Group(found)


def read(symbol, shapes):
    """The ``shapes`` of those inputs that the symbol reads."""
    return {name: shape for name, shape in shapes.items() if name in symbol.list_inputs()}


@st.composite
def random_graphs(draw, most=16, global_average=True):
    """A `RandomGraph` of up to ``most`` operators between inputs and outputs.

    Convolutions with strides, groups, dilation, padding, with or without bias, some with the weight of another one,
    deconvolutions, BatchNorm with and without gamma, activations, sums of all kinds, concatenation, pooling, slices,
    dropout, reshaped and transposed tensors, numbers, branches, one or two inputs, several outputs, some of them twice.
    All tensors but flat outputs have four axes.

    Parameters
    ----------
    most : int
    global_average : bool
        False: averages over whole maps are operators `mean`, as in graphs that were fused.
    """
    builder = _Builder(draw, global_average)
    for _ in range(draw(st.integers(3, most))):
        builder.grow()
    symbol = builder.heads()
    shapes = read(symbol, builder.shapes)
    return RandomGraph(symbol, _values(symbol, shapes, draw(st.integers(0, 2 ** 16))), shapes)


def _values(symbol, shapes, seed):
    rng = np.random.default_rng(seed)
    arguments, _, states = symbol.infer_shape(**shapes)
    values = {}
    for name, shape in [*zip(symbol.list_arguments(), arguments), *zip(symbol.list_auxiliary_states(), states)]:
        if name in shapes:
            continue
        if name.endswith(('gamma', 'var', 'factor')):
            array = rng.uniform(0.5, 1.5, shape)
        elif name.endswith('weight'):
            array = rng.normal(size=shape) / math.sqrt(max(math.prod(shape[1:]), 1))
        else:
            array = 0.2 * rng.normal(size=shape)
        values[name] = nd.array(array)
    return values
