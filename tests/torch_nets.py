"""Nets of torchvision and timm, written down from their definitions as functions of a state dict.

`Net` runs them on MXNet's operators. Of a name that it does not have yet it makes a random tensor: run once, and
``net.state`` is a state dict with the real names and shapes. `modules` are some of the nets in torch itself.
"""
import sys
from importlib import import_module

import numpy as np
from mxnet import nd


def get_model(name, **kwargs):
    """gluoncv's, which refuses to be imported where it finds torch 2."""
    if 'gluoncv' not in sys.modules:
        found = sys.modules.pop('torch', None)
        sys.modules['torch'] = None
        import_module('gluoncv.model_zoo')
        del sys.modules['torch']
        if found is not None:
            sys.modules['torch'] = found
    return sys.modules['gluoncv'].model_zoo.get_model(name, **kwargs)


def relu(x):
    return nd.relu(x)


def relu6(x):
    return nd.clip(x, 0, 6)


def hard_swish(x):
    return x * relu6(x + 3) / 6


class Net:
    def __init__(self, rng, eps=1e-5, state=None):
        self.rng, self.eps, self.state = rng, eps, {} if state is None else state

    def tensor(self, name, make):
        if name not in self.state:
            self.state[name] = np.asarray(make(), np.float32)
        return nd.array(self.state[name])

    def conv(self, x, name, out, kernel=1, stride=1, groups=1, bias=False):
        """Convolution; its channels are of very different size, so that BatchNorm's eps is seen."""
        shape = (out, x.shape[1] // groups, kernel, kernel)
        size = np.prod(shape[1:]) ** -0.5 * (1 if bias else 10 ** self.rng.uniform(-1.5, 0, (out, 1, 1, 1)))
        weight = self.tensor(f'{name}.weight', lambda: self.rng.normal(0, 1, shape) * size)
        more = [self.tensor(f'{name}.bias', lambda: self.rng.normal(0, 0.3, out))] if bias else []
        return nd.Convolution(x, weight, *more, kernel=(kernel, kernel), stride=(stride, stride), num_filter=out,
                              pad=(kernel // 2, kernel // 2), num_group=groups, no_bias=not bias)

    def norm(self, x, name):
        """BatchNorm in inference; made with statistics near those of x, if they do not amplify its rounding."""
        n, values = x.shape[1], x.asnumpy()
        var = self.tensor(f'{name}.running_var', lambda: self.rng.uniform(0.7, 1.4, n) * (
            values.var((0, 2, 3)) + 0.1 * (values ** 2).mean((0, 2, 3))))
        mean = self.tensor(f'{name}.running_mean', lambda: values.mean((0, 2, 3)) + self.rng.normal(0, 0.01, n))
        gamma = self.tensor(f'{name}.weight', lambda: self.rng.uniform(-1, 1.5, n))
        beta = self.tensor(f'{name}.bias', lambda: self.rng.normal(0.5, 1, n))
        self.tensor(f'{name}.num_batches_tracked', lambda: 7)
        scale = gamma / nd.sqrt(var + self.eps)
        return x * scale.reshape((1, n, 1, 1)) + (beta - mean * scale).reshape((1, n, 1, 1))

    def linear(self, x, name, out):
        weight = self.tensor(f'{name}.weight', lambda: self.rng.normal(0, x.shape[1] ** -0.5, (out, x.shape[1])))
        return nd.dot(x, weight.T) + self.tensor(f'{name}.bias', lambda: self.rng.normal(0, 0.3, out))


def pooled(x):
    return nd.mean(x, axis=(2, 3))


def resnet(net, x, blocks, bottleneck, classes=10, deep_stem=0, avg_down=False):
    """torchvision's and timm's ResNet; ``deep_stem``, its width, and ``avg_down`` are timm's c, s and d."""
    if deep_stem:
        x = relu(net.norm(net.conv(x, 'conv1.0', deep_stem, 3, 2), 'conv1.1'))
        x = relu(net.norm(net.conv(x, 'conv1.3', deep_stem, 3), 'conv1.4'))
        x = net.conv(x, 'conv1.6', 2 * deep_stem, 3)
    else:
        x = net.conv(x, 'conv1', 64, 7, 2)
    x = relu(net.norm(x, 'bn1'))
    x = nd.Pooling(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type='max')
    for stage, count in enumerate(blocks):
        for number in range(count):
            name, width = f'layer{stage + 1}.{number}', 64 * 2 ** stage
            stride = 2 if stage and not number else 1
            x = residual(net, x, name, width, stride, bottleneck, avg_down)
    return net.linear(pooled(x), 'fc', classes)


def residual(net, x, name, width, stride, bottleneck, avg_down):
    out = width * (4 if bottleneck else 1)
    kernels = [(width, 1, 1), (width, 3, stride), (out, 1, 1)] if bottleneck else [(width, 3, stride), (out, 3, 1)]
    y = x
    for place, (channels, kernel, step) in enumerate(kernels, 1):
        y = net.norm(net.conv(y, f'{name}.conv{place}', channels, kernel, step), f'{name}.bn{place}')
        y = relu(y) if place < len(kernels) else y
    if stride > 1 or x.shape[1] != out:
        if avg_down:
            if stride > 1:
                x = nd.Pooling(x, kernel=(2, 2), stride=(2, 2), pool_type='avg', pooling_convention='full',
                               count_include_pad=False)
            x = net.norm(net.conv(x, f'{name}.downsample.1', out), f'{name}.downsample.2')
        else:
            x = net.norm(net.conv(x, f'{name}.downsample.0', out, 1, stride), f'{name}.downsample.1')
    return relu(x + y)


def timm_mobilenetv1(net, x, classes=10):
    x = relu6(net.norm(net.conv(x, 'conv_stem', 32, 3, 2), 'bn1'))
    for stage, (count, out) in enumerate([(1, 64), (2, 128), (2, 256), (6, 512), (2, 1024)]):
        for number in range(count):
            name = f'blocks.{stage}.{number}'
            stride = 2 if stage and not number else 1
            x = relu6(net.norm(net.conv(x, f'{name}.conv_dw', x.shape[1], 3, stride, x.shape[1]), f'{name}.bn1'))
            x = relu6(net.norm(net.conv(x, f'{name}.conv_pw', out), f'{name}.bn2'))
    return net.linear(pooled(x), 'classifier', classes)


def inverted(net, x, names, kernel, stride, expanded, out, act, squeeze=None):
    """A bottleneck of MobileNetV2 and V3; ``names`` are those of (layer, BatchNorm) of each convolution."""
    y = x
    if expanded != x.shape[1]:
        conv, norm = next(names)
        y = act(net.norm(net.conv(y, conv, expanded), norm))
    conv, norm = next(names)
    y = act(net.norm(net.conv(y, conv, expanded, kernel, stride, expanded), norm))
    if squeeze:
        reduce, expand = next(names)
        s = nd.mean(y, axis=(2, 3), keepdims=True)
        s = net.conv(relu(net.conv(s, reduce, squeeze, bias=True)), expand, expanded, bias=True)
        y = y * (relu6(s + 3) / 6)
    conv, norm = next(names)
    y = net.norm(net.conv(y, conv, out), norm)
    return x + y if stride == 1 and x.shape[1] == out else y


def timm_names(name, expands, squeeze):
    if expands:
        return iter([(f'{name}.conv_pw', f'{name}.bn1'), (f'{name}.conv_dw', f'{name}.bn2'),
                     *[(f'{name}.se.conv_reduce', f'{name}.se.conv_expand')] * bool(squeeze),
                     (f'{name}.conv_pwl', f'{name}.bn3')])
    return iter([(f'{name}.conv_dw', f'{name}.bn1'),
                 *[(f'{name}.se.conv_reduce', f'{name}.se.conv_expand')] * bool(squeeze),
                 (f'{name}.conv_pw', f'{name}.bn2')])


V2 = [(1, 1, 16, 1), (6, 2, 24, 2), (6, 3, 32, 2), (6, 4, 64, 2), (6, 3, 96, 1), (6, 3, 160, 2), (6, 1, 320, 1)]


def torchvision_mobilenetv2(net, x, classes=10):
    x = relu6(net.norm(net.conv(x, 'features.0.0', 32, 3, 2), 'features.0.1'))
    place = 0
    for t, count, out, first in V2:
        for number in range(count):
            place += 1
            name = f'features.{place}.conv'
            pairs = [(f'{name}.{i}.0', f'{name}.{i}.1') for i in range(2 if t > 1 else 1)]
            pairs.append((f'{name}.{len(pairs)}', f'{name}.{len(pairs) + 1}'))
            x = inverted(net, x, iter(pairs), 3, 1 if number else first, t * x.shape[1], out, relu6)
    x = relu6(net.norm(net.conv(x, 'features.18.0', 1280), 'features.18.1'))
    return net.linear(pooled(x), 'classifier.1', classes)


def timm_mobilenetv2(net, x, classes=10):
    x = relu6(net.norm(net.conv(x, 'conv_stem', 32, 3, 2), 'bn1'))
    for stage, (t, count, out, first) in enumerate(V2):
        for number in range(count):
            names = timm_names(f'blocks.{stage}.{number}', t > 1, None)
            x = inverted(net, x, names, 3, 1 if number else first, t * x.shape[1], out, relu6)
    x = relu6(net.norm(net.conv(x, 'conv_head', 1280), 'bn2'))
    return net.linear(pooled(x), 'classifier', classes)


# kernel, expanded, out, squeezed, activation, stride; one list for each of timm's stages
V3 = {'large': [[(3, 16, 16, 0, relu, 1)],
                [(3, 64, 24, 0, relu, 2), (3, 72, 24, 0, relu, 1)],
                [(5, 72, 40, 24, relu, 2), (5, 120, 40, 32, relu, 1), (5, 120, 40, 32, relu, 1)],
                [(3, 240, 80, 0, hard_swish, 2), (3, 200, 80, 0, hard_swish, 1),
                 (3, 184, 80, 0, hard_swish, 1), (3, 184, 80, 0, hard_swish, 1)],
                [(3, 480, 112, 120, hard_swish, 1), (3, 672, 112, 168, hard_swish, 1)],
                [(5, 672, 160, 168, hard_swish, 2), (5, 960, 160, 240, hard_swish, 1),
                 (5, 960, 160, 240, hard_swish, 1)]],
      'small': [[(3, 16, 16, 8, relu, 2)],
                [(3, 72, 24, 0, relu, 2), (3, 88, 24, 0, relu, 1)],
                [(5, 96, 40, 24, hard_swish, 2), (5, 240, 40, 64, hard_swish, 1), (5, 240, 40, 64, hard_swish, 1)],
                [(5, 120, 48, 32, hard_swish, 1), (5, 144, 48, 40, hard_swish, 1)],
                [(5, 288, 96, 72, hard_swish, 2), (5, 576, 96, 144, hard_swish, 1),
                 (5, 576, 96, 144, hard_swish, 1)]]}
LAST = {'large': (960, 1280), 'small': (576, 1024)}


def torchvision_mobilenetv3(net, x, size, classes=10):
    x = hard_swish(net.norm(net.conv(x, 'features.0.0', 16, 3, 2), 'features.0.1'))
    rows = [row for stage in V3[size] for row in stage]
    for place, (kernel, expanded, out, squeeze, act, stride) in enumerate(rows, 1):
        name, pairs = f'features.{place}.block', []
        for kind in ['conv'] * (1 + (expanded != x.shape[1])) + ['se'] * bool(squeeze) + ['conv']:
            part = f'{name}.{len(pairs)}'
            pairs.append((f'{part}.0', f'{part}.1') if kind == 'conv' else (f'{part}.fc1', f'{part}.fc2'))
        x = inverted(net, x, iter(pairs), kernel, stride, expanded, out, act, squeeze)
    name = f'features.{len(rows) + 1}'
    x = pooled(hard_swish(net.norm(net.conv(x, f'{name}.0', LAST[size][0]), f'{name}.1')))
    return net.linear(hard_swish(net.linear(x, 'classifier.0', LAST[size][1])), 'classifier.3', classes)


def timm_mobilenetv3(net, x, size, classes=10):
    x = hard_swish(net.norm(net.conv(x, 'conv_stem', 16, 3, 2), 'bn1'))
    for stage, rows in enumerate(V3[size]):
        for number, (kernel, expanded, out, squeeze, act, stride) in enumerate(rows):
            names = timm_names(f'blocks.{stage}.{number}', expanded != x.shape[1], squeeze)
            x = inverted(net, x, names, kernel, stride, expanded, out, act, squeeze)
    name = f'blocks.{len(V3[size])}.0'
    x = hard_swish(net.norm(net.conv(x, f'{name}.conv', LAST[size][0]), f'{name}.bn1'))
    x = hard_swish(net.conv(nd.mean(x, axis=(2, 3), keepdims=True), 'conv_head', LAST[size][1], bias=True))
    return net.linear(x.flatten(), 'classifier', classes)


def modules(torch):
    """{name: function that makes the torch.nn.Module with 10 classes}; names of children as in torchvision and timm."""
    nn, functional = torch.nn, torch.nn.functional

    class Module(nn.Module):
        def __init__(self, run, **children):
            super().__init__()
            self.run = run
            for name, child in children.items():
                self.add_module(name, child)

        def forward(self, x):
            return self.run(self, x)

    def conv(channels, out, kernel=1, stride=1, groups=1):
        return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)

    def unit(channels, out, kernel, stride, groups, act, eps=1e-5):
        return nn.Sequential(conv(channels, out, kernel, stride, groups), nn.BatchNorm2d(out, eps), act)

    def bottleneck(channels, width, stride, avg_down):
        out = 4 * width
        parts = {'conv1': conv(channels, width), 'bn1': nn.BatchNorm2d(width),
                 'conv2': conv(width, width, 3, stride), 'bn2': nn.BatchNorm2d(width),
                 'conv3': conv(width, out), 'bn3': nn.BatchNorm2d(out)}
        if channels != out and avg_down:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            parts['downsample'] = nn.Sequential(pool, conv(channels, out), nn.BatchNorm2d(out))
        elif channels != out:
            parts['downsample'] = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

        def run(m, x):
            y = functional.relu(m.bn2(m.conv2(functional.relu(m.bn1(m.conv1(x))))))
            return functional.relu(m.bn3(m.conv3(y)) + (m.downsample(x) if 'downsample' in parts else x))
        return Module(run, **parts)

    def resnet50(deep=False):
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        if deep:
            stem = nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 32, 3), nn.BatchNorm2d(32),
                                 nn.ReLU(), conv(32, 64, 3))
        layers, channels = {}, 64
        for stage, count in enumerate((3, 4, 6, 3)):
            blocks = []
            for number in range(count):
                blocks.append(bottleneck(channels, 64 * 2 ** stage, 2 if stage and not number else 1, deep))
                channels = 256 * 2 ** stage
            layers[f'layer{stage + 1}'] = nn.Sequential(*blocks)

        def run(m, x):
            x = functional.max_pool2d(functional.relu(m.bn1(m.conv1(x))), 3, 2, 1)
            return m.fc(m.layer4(m.layer3(m.layer2(m.layer1(x)))).mean((2, 3)))
        return Module(run, conv1=stem, bn1=nn.BatchNorm2d(64), **layers, fc=nn.Linear(2048, 10))

    def features_and_classifier(features, classifier):
        return Module(lambda m, x: m.classifier(m.features(x).mean((2, 3))), features=nn.Sequential(*features),
                      classifier=classifier)

    def bottleneck_of(name, parts, skips):
        return Module(lambda m, x: getattr(m, name)(x) + x if skips else getattr(m, name)(x),
                      **{name: nn.Sequential(*parts)})

    def mobilenet_v2():
        act, x, layers = nn.ReLU6(), 32, [unit(3, 32, 3, 2, 1, nn.ReLU6())]
        for t, count, out, first in V2:
            for number in range(count):
                n, stride = x * t, 1 if number else first
                parts = [unit(x, n, 1, 1, 1, act)] * (t > 1) + [unit(n, n, 3, stride, n, act), conv(n, out),
                                                                nn.BatchNorm2d(out)]
                layers.append(bottleneck_of('conv', parts, stride == 1 and x == out))
                x = out
        return features_and_classifier([*layers, unit(320, 1280, 1, 1, 1, act)],
                                       nn.Sequential(nn.Dropout(), nn.Linear(1280, 10)))

    def squeeze_and_excite(n, width):
        return Module(lambda m, x: x * functional.hardsigmoid(m.fc2(functional.relu(m.fc1(x.mean((2, 3), True))))),
                      fc1=nn.Conv2d(n, width, 1), fc2=nn.Conv2d(width, n, 1))

    def mobilenet_v3_small():
        x, layers = 16, [unit(3, 16, 3, 2, 1, nn.Hardswish(), 1e-3)]
        for kernel, n, out, squeeze, act, stride in (row for stage in V3['small'] for row in stage):
            act = nn.ReLU() if act is relu else nn.Hardswish()
            parts = [unit(x, n, 1, 1, 1, act, 1e-3)] * (n != x) + [unit(n, n, kernel, stride, n, act, 1e-3)]
            parts += [squeeze_and_excite(n, squeeze)] if squeeze else []
            parts.append(unit(n, out, 1, 1, 1, nn.Identity(), 1e-3))
            layers.append(bottleneck_of('block', parts, stride == 1 and x == out))
            x = out
        return features_and_classifier(
            [*layers, unit(96, 576, 1, 1, 1, nn.Hardswish(), 1e-3)],
            nn.Sequential(nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(), nn.Linear(1024, 10)))

    def mobilenetv1_100():
        stages, x = [], 32
        for stage, (count, out) in enumerate([(1, 64), (2, 128), (2, 256), (6, 512), (2, 1024)]):
            blocks = []
            for number in range(count):
                blocks.append(Module(
                    lambda m, x: functional.relu6(m.bn2(m.conv_pw(functional.relu6(m.bn1(m.conv_dw(x)))))),
                    conv_dw=conv(x, x, 3, 2 if stage and not number else 1, x), bn1=nn.BatchNorm2d(x),
                    conv_pw=conv(x, out), bn2=nn.BatchNorm2d(out)))
                x = out
            stages.append(nn.Sequential(*blocks))
        return Module(lambda m, x: m.classifier(m.blocks(functional.relu6(m.bn1(m.conv_stem(x)))).mean((2, 3))),
                      conv_stem=conv(3, 32, 3, 2), bn1=nn.BatchNorm2d(32), blocks=nn.Sequential(*stages),
                      classifier=nn.Linear(1024, 10))

    return {'resnet50_v1b': resnet50, 'resnet50_v1d': lambda: resnet50(True), 'mobilenet1.0': mobilenetv1_100,
            'mobilenetv2_1.0': mobilenet_v2, 'mobilenetv3_small': mobilenet_v3_small}


def trained(torch, module, images):
    """``module`` for inference, with BatchNorms unlike each other and statistics of ``images``."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None        # the mean of all batches
            torch.nn.init.uniform_(part.weight, -1, 1.5)
            torch.nn.init.normal_(part.bias, 0.5)
    with torch.no_grad():
        module.train()(images)
    return module.eval()
