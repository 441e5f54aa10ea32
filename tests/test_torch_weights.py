"""`load_torch`: a Gluon net with weights from torch computes what the torch net does, or nothing is loaded."""
from functools import lru_cache, partial

import numpy as np
import pytest
from mxnet import nd
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import gluonquant as gq
import torch_nets as nets
from gluonquant.torch_weights import like_torch, load_torch
from torch_nets import get_model

SIZES = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True),
         152: ((3, 8, 36, 3), True)}
KINDS = {'v1': {}, 'v1b': {}, 'v1c': {'deep_stem': 32}, 'v1d': {'deep_stem': 32, 'avg_down': True},
         'v1s': {'deep_stem': 64}}


def resnet(depth, kind):
    blocks, bottleneck = SIZES[depth]
    return pytest.param(f'resnet{depth}_{kind}', partial(nets.resnet, blocks=blocks, bottleneck=bottleneck,
                        **KINDS[kind]), 1e-5, id=f'resnet{depth}_{kind}',
                        marks=[pytest.mark.slow] * (f'{depth}_{kind}' not in ('18_v1', '18_v1b', '50_v1b', '50_v1d')))


# name in gluoncv, the torch net, its eps
PAIRS = [*(resnet(depth, kind) for depth in SIZES for kind in KINDS
           if kind == 'v1b' or kind in ('v1c', 'v1d', 'v1s') and depth >= 50 or (depth, kind) == (18, 'v1')),
         pytest.param('mobilenet1.0', nets.timm_mobilenetv1, 1e-5, id='mobilenet timm'),
         *(pytest.param('mobilenetv2_1.0', getattr(nets, f'{source}_mobilenetv2'), 1e-5, id=f'mobilenetv2 {source}')
           for source in ('torchvision', 'timm')),
         *(pytest.param(f'mobilenetv3_{size}', partial(getattr(nets, f'{source}_mobilenetv3'), size=size), eps,
                        id=f'mobilenetv3_{size} {source}')
           for source, eps in (('torchvision', 1e-3), ('timm', 1e-5)) for size in ('large', 'small'))]


def made(forward, rng, eps=1e-5, size=72, classes=10):
    """(state dict in a random order of names, an input, the output)."""
    x = nd.array(rng.normal(0, 2, (2, 3, size, size)))
    net = nets.Net(rng, eps)
    out = forward(net, x, classes=classes).asnumpy()
    return {name: net.state[name] for name in rng.permutation(list(net.state))}, x, out


def assert_same(net, x, expected):
    # float32 through up to 152 layers: the worst seen is 5e-6 of the largest output, images differ by 1e-2 and more
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-4, atol=3e-5 * abs(expected).max())


@lru_cache(maxsize=None)
def resnet18(eps=1e-5):
    """A state dict, not to be changed, an input, the output."""
    forward = partial(nets.resnet, blocks=(2, 2, 2, 2), bottleneck=False)
    return made(forward, np.random.default_rng(5), eps, size=48)


def parameters(net):
    return {name: one.data().asnumpy() for name, one in net._collect_params_with_prefix().items()}


def initialized(name, classes=10, size=32):
    net = get_model(name, classes=classes)
    net.initialize()
    net(nd.zeros((1, 3, size, size)))
    return net


@pytest.mark.parametrize('name, forward, eps', PAIRS)
def test_outputs_are_those_of_the_torch_net(name, forward, eps, rng, tmp_path):
    safetensors = pytest.importorskip('safetensors.numpy', reason='writes .safetensors files')
    state, x, expected = made(forward, rng, eps)
    safetensors.save_file(state, tmp_path / 'model.safetensors')
    net = load_torch(tmp_path / 'model.safetensors', get_model(name, classes=10))
    assert_same(net, x, expected)
    net.hybridize()
    assert_same(net, x, expected)


def test_an_expansion_that_torch_lacks_is_the_identity(rng):
    state, x, expected = made(nets.torchvision_mobilenetv2, rng)
    assert_same(load_torch(state, vision.mobilenet_v2_1_0(classes=10)), x, expected)


@pytest.mark.parametrize('eps', [1e-2, 1e-6])
def test_eps_of_torch_goes_into_the_variance(eps):
    state, x, expected = resnet18(eps)
    net = load_torch(state, get_model('resnet18_v1b', classes=10, norm_kwargs={'epsilon': 1e-4}), eps=eps)
    assert_same(net, x, expected)
    assert np.abs(load_torch(state, net)(x).asnumpy() - expected).max() > 1e-3 * abs(expected).max()


def test_values_replace_those_of_a_hybridized_net(rng):
    state, x, expected = made(nets.torchvision_mobilenetv2, rng)
    net = initialized('mobilenetv2_1.0', size=72)
    net.hybridize()
    net(x)
    assert_same(load_torch(state, net), x, expected)


@pytest.mark.parametrize('wrap', [
    lambda state: {'state_dict': {f'module.{name}': array for name, array in state.items()}, 'epoch': 3},
    lambda state: {'model': state, 'optimizer': {}},
    lambda state: {name: nd.array(array) for name, array in state.items()},
    lambda state: {name: array.astype(np.float64) for name, array in state.items()}],
    ids=['module', 'model', 'NDArray', 'float64'])
def test_wrapped_state_dicts_are_found(wrap):
    state, x, expected = resnet18()
    assert_same(load_torch(wrap(state), get_model('resnet18_v1b', classes=10)), x, expected)


def test_half_precision_files_become_float32(rng, tmp_path):
    torch_like = pytest.importorskip('safetensors', reason='reads .safetensors files')
    rounded = rng.normal(0, 1, (10, 3)).astype(np.float32).view(np.uint32) >> 16 << 16
    weight, bias = rounded.astype(np.uint32).view(np.float32), rng.normal(0, 1, 10).astype(np.float16)
    header = (b'{"fc.weight":{"dtype":"BF16","shape":[10,3],"data_offsets":[0,60]},'
              b'"fc.bias":{"dtype":"F16","shape":[10],"data_offsets":[60,80]}}')
    data = (rounded >> 16).astype(np.uint16).tobytes() + bias.tobytes()
    (tmp_path / 'half.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + data)
    assert torch_like.deserialize((tmp_path / 'half.safetensors').read_bytes())
    net = nn.HybridSequential()
    net.add(nn.GlobalAvgPool2D(), nn.Dense(10))
    load_torch(tmp_path / 'half.safetensors', net)
    assert net[1].weight.data().dtype == np.float32
    np.testing.assert_array_equal(net[1].weight.data().asnumpy(), weight)
    np.testing.assert_array_equal(net[1].bias.data().asnumpy(), bias.astype(np.float32))


def test_the_head_stays_for_other_classes(rng):
    state, x, _ = made(nets.torchvision_mobilenetv2, rng)
    net = initialized('mobilenetv2_1.0', classes=7)
    head, before = net.output[0].weight.data().asnumpy(), net.features(x).asnumpy()
    load_torch(state, net, skip_head=True)
    assert net(x).shape == (2, 7)
    np.testing.assert_array_equal(net.output[0].weight.data().asnumpy(), head)
    assert not np.allclose(net.features(x).asnumpy(), before)


@pytest.mark.parametrize('features_alone', [False, True])
def test_a_head_without_values_is_initialized_afterwards(features_alone):
    state, x, _ = resnet18()
    if features_alone:
        state = {name: array for name, array in state.items() if not name.startswith('fc.')}
    net = load_torch(state, get_model('resnet18_v1b', classes=7), skip_head=True)
    net.fc.initialize()
    assert net(x).shape == (2, 7)


@pytest.mark.parametrize('name, forward', [('mobilenet1.0', nets.timm_mobilenetv1),
                                           ('mobilenetv2_1.0', nets.timm_mobilenetv2),
                                           ('mobilenetv3_small', partial(nets.timm_mobilenetv3, size='small'))])
def test_a_changed_net_is_built_again_by_like_torch(name, forward, rng, tmp_path):
    state, x, expected = made(forward, rng)
    load_torch(state, get_model(name, classes=10)).save_parameters(str(tmp_path / 'net.params'))
    net = like_torch(like_torch(get_model(name, classes=10)))
    net.load_parameters(str(tmp_path / 'net.params'))
    assert_same(net, x, expected)


def test_a_changed_net_converts_saves_and_loads(tmp_path):
    def small():
        return like_torch(get_model('mobilenetv2_0.25', classes=10))
    net, x = small(), nd.random.normal(shape=(1, 3, 32, 32))
    net.initialize()
    net(x)
    net.output[0].bias.set_data(nd.arange(10))
    gq.convert(net, bits=8)
    gq.calibrate(net, [x])
    gq.save(net, tmp_path / 'net.npz')
    np.testing.assert_array_equal(gq.load(tmp_path / 'net.npz', small())(x).asnumpy(), net(x).asnumpy())


@pytest.mark.parametrize('name', ['resnet18_v1b', 'mobilenetv3_small'])
def test_like_torch_changes_nothing_else(name):
    net = initialized(name)
    x, before = nd.random.normal(shape=(2, 3, 32, 32)), parameters(net)
    out = net(x).asnumpy()
    np.testing.assert_array_equal(like_torch(net)(x).asnumpy(), out)
    added = set(parameters(net)) - set(before)
    assert added == ({'features.18.bias'} if 'mobile' in name else set())


def renamed(old, new):
    return lambda state: {name.replace(old, new): array for name, array in state.items()}


def without(part):
    return lambda state: {name: array for name, array in state.items() if part not in name}


def replaced(name, shape):
    return lambda state: {**state, name: np.zeros(shape)}


@pytest.mark.parametrize('change, name, message', [
    (dict, 'resnet34_v1b', r"layer 'layer1.2.conv1' of the net has weight \(64, 64, 3, 3\), but its counterpart "
                           r"'layer2.0.conv1' has weight \(128, 64, 3, 3\)"),
    (dict, 'resnet50_v1b', r"layer 'layer1.0.conv1' of the net has weight \(64, 64, 1, 1\), .* \(64, 64, 3, 3\)"),
    (dict, 'mobilenet1.0', r"layer 'features.0' of the net has weight \(32, 3, 3, 3\), .* 'conv1' .* \(64, 3, 7, 7\)"),
    (without('layer4.1.bn2'), 'resnet18_v1b', r"'layer4.1.bn2' of the net has .*, but its counterpart 'fc' has"),
    (without('fc.bias'), 'resnet18_v1b', r"'fc' of the net has weight .* bias \(10,\), .* 'fc' has weight \(10, 512\)"),
    (without('layer2.0.bn1.running_mean'), 'resnet18_v1b', "'layer2.0.bn1' of the net has gamma"),
    (without('fc.'), 'resnet18_v1b', "'fc' of the net has .* counterpart '' has nothing"),
    (replaced('layer4.1.conv3.weight', (5, 5, 1, 1)), 'resnet18_v1b', "'fc' of the net has .* 'layer4.1.conv3' has"),
    (replaced('fc.weight', (12, 512)), 'resnet18_v1b', r"\(12, 512\), .* skip_head=True"),
    (replaced('layer2.0.conv1.weight', (128, 32, 3, 3)), 'resnet18_v1b', "layer 'layer2.0.conv1' of the net"),
    (renamed('layer2', 'stage2'), 'resnet18_v1b', 'in which order bn1, .*, stage2 run'),
    (renamed('bn1', 'norm'), 'resnet18_v1b', 'Known are the ResNets and MobileNets'),
    (lambda state: {}, 'resnet18_v1b', 'holds no tensors'),
    (lambda state: {**state, 'epoch': 3}, 'resnet18_v1b', "'epoch' is a int, not a tensor")])
def test_what_does_not_match_is_named(change, name, message):
    state, _, _ = resnet18()
    net = get_model(name, classes=10)
    with pytest.raises(ValueError, match=message):
        load_torch(change(state), net)
    assert all(one._data is None for one in net.collect_params().values())


def test_a_failed_call_changes_nothing(rng):
    state, x, _ = made(nets.torchvision_mobilenetv2, rng, size=32)
    net = initialized('mobilenetv2_1.0')
    before, out = parameters(net), net(x).asnumpy()
    with pytest.raises(ValueError, match="'output.0' of the net"):
        load_torch(replaced('classifier.1.bias', (9,))(state), net)
    assert parameters(net).keys() == before.keys()
    np.testing.assert_array_equal(net(x).asnumpy(), out)


def test_a_resnet_with_strides_elsewhere_is_refused(rng):
    state, _, _ = made(partial(nets.resnet, blocks=(3, 4, 6, 3), bottleneck=True), rng, size=32)
    with pytest.raises(ValueError, match=r"'features.4.0.body.0' of the net has weight \(64, 64, 1, 1\), bias"):
        load_torch(state, get_model('resnet50_v1', classes=10))


def test_a_net_without_known_input_channels_is_compared_in_full(rng):
    state, _, _ = made(nets.torchvision_mobilenetv2, rng, size=32)
    state['features.1.conv.0.0.weight'] = np.zeros((32, 32, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"'features.3.out.0' of the net has weight \(32, 1, 3, 3\), .*32, 32, 3, 3"):
        load_torch(state, get_model('mobilenetv2_1.0', classes=10))


def test_a_scale_that_the_net_fixes_is_refused():
    state, _, _ = resnet18()
    net = get_model('resnet18_v1b', classes=10, norm_kwargs={'scale': False})
    with pytest.raises(ValueError, match="'bn1' of the net has scale=False"):
        load_torch(state, net)


def test_nets_and_sources_of_other_kinds_are_refused(tmp_path):
    state, _, _ = resnet18()
    net = get_model('resnet18_v1b', classes=10)
    with pytest.raises(TypeError, match='not a gluon Block'):
        load_torch(state, 'resnet18_v1b')
    with pytest.raises(TypeError, match='source is a int'):
        load_torch(5, net)
    with pytest.raises(ValueError, match=r"ends in '.onnx', known are .safetensors, .pth"):
        load_torch(tmp_path / 'net.onnx', net)
    with pytest.raises(ValueError, match='load into the float net'):
        load_torch(state, gq.convert(net, bits=4))


def test_missing_and_damaged_files_are_named(tmp_path):
    net, path = get_model('resnet18_v1b', classes=10), tmp_path / 'net.safetensors'
    pytest.importorskip('safetensors', reason='reads .safetensors files')
    with pytest.raises(FileNotFoundError, match='net.safetensors'):
        load_torch(path, net)
    path.write_bytes(b'what is this?')
    with pytest.raises(ValueError, match='net.safetensors: not a complete safetensors file'):
        load_torch(path, net)
    header = b'{"fc.weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + b'1')
    with pytest.raises(ValueError, match="'fc.weight' is of dtype U8"):
        load_torch(path, net)


@pytest.mark.parametrize('package, suffix', [('safetensors', 'safetensors'), ('torch', 'pth.tar')])
def test_a_missing_package_is_asked_for(package, suffix, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, package, None)
    with pytest.raises(ImportError, match=f'net.{suffix}: to read it, pip install {package}'):
        load_torch(tmp_path / f'net.{suffix}', get_model('resnet18_v1b'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50_v1b', 'resnet50_v1d', 'mobilenet1.0', 'mobilenetv2_1.0',
                                  'mobilenetv3_small'])
def test_outputs_are_those_of_torch_itself(name, seed, tmp_path):
    torch = pytest.importorskip('torch', reason='compares with torch')
    torch.manual_seed(seed)
    module = nets.trained(torch, nets.modules(torch)[name](), torch.randn(8, 3, 72, 72))
    images = torch.randn(2, 3, 72, 72)
    with torch.no_grad():
        expected = module(images).numpy()
    torch.save({'state_dict': module.state_dict(), 'epoch': 1}, tmp_path / 'model.pth.tar')
    for source in (tmp_path / 'model.pth.tar', module.state_dict()):
        assert_same(load_torch(source, get_model(name, classes=10)), nd.array(images.numpy()), expected)


@pytest.mark.slow
def test_pickles_of_more_than_tensors_are_refused(tmp_path):
    torch = pytest.importorskip('torch', reason='reads .pth files')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'model.pth')
    with pytest.raises(ValueError, match='model.pth: torch cannot read it as tensors alone'):
        load_torch(tmp_path / 'model.pth', get_model('resnet18_v1b'))
    torch.save({name: one.bfloat16() for name, one in torch.nn.Linear(512, 10).state_dict().items()},
               tmp_path / 'head.bin')
    with pytest.raises(ValueError, match="head.bin: layer 'conv1' of the net"):
        load_torch(tmp_path / 'head.bin', get_model('resnet18_v1b'))
