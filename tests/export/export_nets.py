"""Hypothesis strategy: small random Gluon nets, how they are quantized, and what the three ways to run them compute."""
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant import integer
from gluonquant.layers import quantizers
from gluonquant.symbol_graph import QUANTIZE

SHAPE = (2, 4, 9, 8)
BATCHES = 2


# ---------------------------------------------------------------- nets


class Step(NamedTuple):
    """An operator on the tensors of earlier steps, by number; 0 is the input. It makes one tensor."""
    kind: str
    inputs: Tuple[int, ...]
    options: Dict[str, Any]


class RandomNet(nn.HybridBlock):
    """Runs steps: what nobody reads goes to the outputs, and so do those of the number ``shown``."""

    def __init__(self, steps, seed, shown=()):
        super().__init__(prefix='net_')
        self.steps, self.shown = steps, shown
        with self.name_scope():
            for number, step in enumerate(steps, 1):
                if step.kind in LAYERS:
                    setattr(self, f'{step.kind.lower()}{number}', LAYERS[step.kind](**step.options))
        self.initialize()
        self(nd.zeros(SHAPE))
        _shake(self, np.random.default_rng(seed))

    def hybrid_forward(self, F, x):
        tensors, read = [x], set()
        for number, (kind, inputs, options) in enumerate(self.steps, 1):
            given = [tensors[place] for place in inputs]
            read.update(inputs)
            layer = getattr(self, f'{kind.lower()}{number}', None)
            tensors.append(OPERATORS[kind](F, *given, **options) if layer is None else layer(*given))
        return [tensor for place, tensor in enumerate(tensors) if place not in read or place in self.shown]


LAYERS = {'Conv': nn.Conv2D, 'Dense': nn.Dense, 'BatchNorm': nn.BatchNorm, 'MaxPool': nn.MaxPool2D,
          'AvgPool': nn.AvgPool2D, 'GlobalMaxPool': nn.GlobalMaxPool2D, 'GlobalAvgPool': nn.GlobalAvgPool2D,
          'LeakyReLU': nn.LeakyReLU}
OPERATORS = {
    'relu': lambda F, x: F.relu(x), 'relu6': lambda F, x: F.clip(x, 0, 6), 'sigmoid': lambda F, x: F.sigmoid(x),
    'add': lambda F, x, y: x + y, 'concat': lambda F, *xs: F.concat(*xs, dim=1), 'flatten': lambda F, x: F.flatten(x),
    'reshape': lambda F, x: F.reshape(x, shape=(0, 0, -1, 1)),
    'slice': lambda F, x, **given: F.slice_axis(x, **given),
    'part': lambda F, x, index: F.split(x, num_outputs=2, axis=1)[index],
    'crop': lambda F, x: F.slice(x, begin=(None, None, 1, 0), end=(None, None, None, 3))}


def _shake(net, rng):
    """Random Parameters; some channels have next to no weight, BatchNorm has factors of both signs and 0, and some
    variances next to 0."""
    for name, parameter in net.collect_params().items():
        shape = parameter.shape
        if name.endswith('weight'):
            size = rng.choice([1, 1, 1, 1, 1, 1e-9, 0], (shape[0], *[1] * (len(shape) - 1)))
            value = size * rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith('gamma'):
            value = rng.uniform(0.5, 1.5, shape) * rng.choice([1, 1, 1, -1, -1, 0], shape)
        elif name.endswith('var'):
            value = rng.uniform(0.3, 1.5, shape) * rng.choice([1, 1, 1, 1, 1e-8], shape)
        else:
            value = 0.3 * rng.normal(size=shape)
        parameter.set_data(nd.array(value))


class _Builder:
    """Grows a list of steps: every method but `heads` adds a step or more, if one fits."""

    def __init__(self, draw):
        self.draw, self.steps, self.shapes = draw, [], [SHAPE]

    def pick(self, *values):
        return self.draw(st.sampled_from(values))

    def tensor(self, fits=lambda shape: len(shape) == 4):
        """The number of a tensor that fits, rather of a late one; None if there is none."""
        found = [number for number in reversed(range(len(self.shapes))) if fits(self.shapes[number])]
        return found[min(self.pick(0, 0, 0, 0, 1, 2, 4), len(found) - 1)] if found else None

    def add(self, kind, *inputs, shape=None, **options):
        """Append a step; returns the number of its tensor."""
        self.steps.append(Step(kind, inputs, options))
        self.shapes.append(self.shapes[inputs[0]] if shape is None else shape)
        return len(self.steps)

    def grow(self):
        self.draw(st.sampled_from([self.convolution, self.convolution, self.convolution, self.activation, self.sum,
                                   self.sums, self.concat, self.pooling, self.pooling, self.part, self.move]))()

    def convolution(self):
        """A convolution, perhaps with BatchNorm, perhaps with an activation."""
        x = self.tensor()
        batch, channels, *sizes = self.shapes[x]
        groups = self.pick(1, 1, *(count for count in (2, channels) if channels % count == 0))
        filters = groups * self.pick(1, 2, 3, 17) if groups < channels else channels * self.pick(1, 1, 2)
        kernel, dilation, stride = self.pick(1, 3, 3, 2), self.pick(1, 1, 2), self.pick(1, 1, 2)
        reach = (kernel - 1) * dilation
        pad = self.pick(0, 1) if kernel > 1 else 0
        pad = max(pad, -(-(reach + 1 - min(sizes)) // 2), 0)
        made = [(size + 2 * pad - reach - 1) // stride + 1 for size in sizes]
        made = self.add('Conv', x, shape=(batch, filters, *made), channels=filters, kernel_size=kernel, strides=stride,
                        padding=pad, dilation=dilation, groups=groups, use_bias=self.pick(True, False),
                        in_channels=channels)
        if self.pick(True, False):
            self.add('BatchNorm', made, scale=self.pick(True, True, False), epsilon=self.pick(1e-5, 1e-3),
                     in_channels=filters)
        if self.pick(True, False):
            self.activation(len(self.steps))

    def activation(self, x=None):
        kind = self.pick('relu', 'relu', 'relu6', 'sigmoid', 'LeakyReLU')
        self.add(kind, self.tensor(bool) if x is None else x, **({'alpha': 0.1} if kind == 'LeakyReLU' else {}))

    def sum(self, x=None):
        x = self.tensor() if x is None else x
        alike = [number for number, shape in enumerate(self.shapes) if shape == self.shapes[x]]
        return self.add('add', *self.pick((x, self.pick(*alike)), (self.pick(*alike), x)))

    def sums(self):
        """A chain of sums."""
        self.sum(self.sum())

    def concat(self):
        x = self.tensor(lambda shape: len(shape) == 4 and shape[1] <= 8)
        if x is not None:
            alike = [number for number, shape in enumerate(self.shapes)
                     if shape[2:] == self.shapes[x][2:] and len(shape) == 4 and shape[1] <= 8]
            parts = [x, *self.draw(st.lists(st.sampled_from(alike), min_size=1, max_size=2))]
            batch, _, *sizes = self.shapes[x]
            self.add('concat', *parts, shape=(batch, sum(self.shapes[part][1] for part in parts), *sizes))

    def pooling(self):
        x, kind = self.tensor(), self.pick('Max', 'Avg', 'Avg')
        batch, channels, *sizes = self.shapes[x]
        if self.pick(False, False, True):
            self.add(f'Global{kind}Pool', x, shape=(batch, channels, 1, 1))
            return
        size, stride = self.pick(*(size for size in (1, 2, 3) if size <= min(sizes))), self.pick(1, 2)
        pad, ceil = self.pick(*range((size + 1) // 2)), self.pick(False, True)
        counted = {'count_include_pad': self.pick(True, False)} if kind == 'Avg' else {}
        made = [-(-(room + 2 * pad - size) // stride) + 1 if ceil else (room + 2 * pad - size) // stride + 1
                for room in sizes]
        self.add(f'{kind}Pool', x, shape=(batch, channels, *made), pool_size=size, strides=stride, padding=pad,
                 ceil_mode=ceil, **counted)

    def part(self):
        """Both halves of the channels."""
        x = self.tensor(lambda shape: len(shape) == 4 and shape[1] % 2 == 0)
        if x is not None:
            batch, channels, *sizes = self.shapes[x]
            for index in (0, 1):
                self.add('part', x, shape=(batch, channels // 2, *sizes), index=index)

    def move(self):
        x = self.tensor()
        batch, channels, height, width = self.shapes[x]
        kind = self.pick('reshape', 'slice', *(['crop'] if height > 1 and width > 3 else []))
        if kind == 'reshape':
            self.add(kind, x, shape=(batch, channels, height * width, 1))
        elif kind == 'slice':
            self.add(kind, x, shape=(batch, -(-channels // 2), height, width), axis=1, begin=channels // 2, end=None)
        else:
            self.add(kind, x, shape=(batch, channels, height - 1, 3))

    def head(self):
        """Dense layers behind a late tensor."""
        x = self.tensor()
        if self.pick(True, False):
            x = self.add(self.pick('GlobalAvgPool', 'GlobalMaxPool'), x, shape=(*self.shapes[x][:2], 1, 1))
        if self.pick(True, False):
            x = self.add('flatten', x, shape=(SHAPE[0], int(np.prod(self.shapes[x][1:]))))
        for units in self.pick((3,), (5, 3)):
            x = self.add('Dense', x, shape=(SHAPE[0], units), units=units, use_bias=self.pick(True, False),
                         in_units=int(np.prod(self.shapes[x][1:])))
            if units == 5 and self.pick(True, False):
                self.add('relu', x)
                x = len(self.steps)


# ---------------------------------------------------------------- cases


class Case(NamedTuple):
    """A net and how it is quantized."""
    steps: Tuple[Step, ...]
    seed: int
    shown: Tuple[int, ...]      # numbers of tensors that are outputs although other steps read them
    way: str            # 'onnxruntime' or 'free', by attach, or 'convert'
    options: Dict[str, Any]

    def __repr__(self):
        lines = [f'    Step({step.kind!r}, {step.inputs}, {step.options}),' for step in self.steps]
        rest = f'{self.seed}, {self.shown}, {self.way!r}, {self.options}'
        return '\n'.join(['Case((', *lines, f'), {rest})'])

    def images(self, seed=0):
        """A batch; those for calibration, of other seeds than 0, have smaller numbers, and fewer images."""
        shape = (2 if seed else 3, *SHAPE[1:])
        return nd.array(np.random.default_rng([self.seed, seed]).normal(0, 0.5 if seed else 1, shape))

    def calibrated(self):
        """The quantized net."""
        net = RandomNet(self.steps, self.seed, self.shown)
        if self.way == 'convert':
            net = gq.convert(net, **self.options)
        else:
            net = gq.attach(net, target=None if self.way == 'free' else self.way, **self.options)
        gq.calibrate(net, [self.images(seed) for seed in range(1, 1 + BATCHES)], forward=lambda net, x: net(x))
        assume(all(quantizer.calibrated for quantizer in quantizers(net).values()))     # not behind what is always 0
        gq.set_phase(net, True)             # of GDRQ
        _train(net, np.random.default_rng(self.seed))
        return net


def _train(net, rng):
    """Move learned ranges from where calibration has left them."""
    for quantizer in (quantizer for quantizer in quantizers(net).values() if quantizer.grid):
        learned = [name for name, parameter in quantizer._reg_params.items() if parameter.trainable]
        quantizer.write(**{name: quantizer.value(name) * rng.uniform(0.8, 1.2) for name in learned})


WEIGHTS, ACTIVATIONS = (gq.quantizers.available(role) for role in ('weight', 'activation'))


@st.composite
def cases(draw, ways=('onnxruntime', 'free', 'convert'), weights=WEIGHTS, least=1, most=9):
    """Any net, with any methods and bits."""
    builder = _Builder(draw)
    builder.convolution()
    for _ in range(draw(st.integers(least, most))):
        builder.grow()
    if draw(st.booleans()):
        builder.head()
    bits, numbers = st.integers(2, 8), st.integers(1, len(builder.steps))
    shown = draw(st.sampled_from([(), (), tuple({draw(numbers)})]))
    return Case(tuple(builder.steps), draw(st.integers(0, 2 ** 16)), shown, draw(st.sampled_from(ways)), {
        'weight': draw(st.sampled_from(weights)), 'activation': draw(st.sampled_from(ACTIVATIONS)),
        'weight_bits': draw(bits), 'activation_bits': draw(bits), 'first_last_bits': draw(st.sampled_from([8, 7, 4]))})


# ---------------------------------------------------------------- what they compute


class Deployed(NamedTuple):
    """A finalized net and the content of its file."""
    net: Any
    proto: Any
    model: integer.Model

    def tensors(self):
        """[(name of the codes, path of their quantizer, their shift, its node)] as the file tells."""
        return json.loads(self.model.metadata['gluonquant'])['tensors']


def deployed(net):
    """`Deployed` from a calibrated net; ValueError if it cannot be expressed."""
    import onnx
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'net.onnx')
        final = gq.export_onnx(gq.finalize(net, overflow='zero'), path, SHAPE)
        return Deployed(final, onnx.load(path), integer.read(path))


def run_integers(made, x):
    """{name: array} of outputs and codes, by the integer runner."""
    names = [name for node in made.model.nodes for name in node.outputs if name.endswith('.codes')]
    return integer.Runner(made.model)(x.asnumpy(), keep=names)


def steps_before_rounding(made, x, name):
    """What becomes the codes ``name`` of the integer runner, in steps of their grid."""
    maker = made.model.maker()
    node = maker[maker[name].inputs[0]] if maker[name].op == 'Clip' else maker[name]
    source, scale, _ = node.inputs
    return integer.Runner(made.model)(x.asnumpy(), keep=[source])[source] / made.model.constants[scale]


def run_onnxruntime(made, x):
    """{name: array} of outputs and codes, by ONNX Runtime as users run it."""
    import onnx
    import onnxruntime
    proto = onnx.ModelProto()
    proto.CopyFrom(made.proto)
    outputs = [info.name for info in proto.graph.output]
    chosen = [info for info in proto.graph.value_info if info.name.endswith('.codes') and info.name not in outputs
              and info.name not in made.model.constants]
    proto.graph.output.extend(chosen)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=['CPUExecutionProvider'])
    outputs += [info.name for info in chosen]
    return dict(zip(outputs, session.run(outputs, {session.get_inputs()[0].name: x.asnumpy()})))


def run_gluon(made, x, codes):
    """Yield (node, its own codes, steps in front of rounding) of each activation quantizer of the Gluon net.

    Behind it the net goes on with ``codes``, those of another runner, so that each is compared on equal inputs.
    """
    net, found = made.net, {node: (name, shift) for name, _, shift, node in made.tensors()}
    seen, run_node = [], net._run

    def force(F, node, inputs):
        if node.op != QUANTIZE or node.name not in found or found[node.name][0] not in codes:
            return run_node(F, node, inputs)
        quantizer, (name, shift) = net._children[node.attrs['quantizer']], found[node.name]
        scale, zero = (values[0] for values in quantizer.qparams())
        offset, step = quantizer.encoder() if hasattr(quantizer, 'encoder') else (0, scale)
        seen.append((name, quantizer.quantize(inputs[0]).asnumpy() + shift, (inputs[0].asnumpy() - offset) / step))
        return nd.array((codes[name].astype(np.int32) - shift - zero).astype(np.float32) * scale)
    net._run = force
    try:
        out = net(x)
    finally:
        del net._run
    return seen, [array.asnumpy() for array in (out if isinstance(out, (list, tuple)) else [out])]
