"""`save` and `load`, and Gluon's own: nothing is lost, and what is damaged or foreign is refused."""
import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import layers, named_blocks, quantizers

REPOSITORY = Path(gq.__file__).parents[1]
BUILD = '''
def build(classes=3, channels=6):
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Conv2D(channels, 3, use_bias=False), nn.BatchNorm(),
                nn.Conv2D(4, 3, groups=2), nn.Activation('relu'), nn.Dense(classes))
    return net


def images(seed=0):
    return nd.array(np.random.default_rng(seed).uniform(-1, 1, (4, 3, 8, 8)))
'''
exec(BUILD)     # the same text runs in the fresh processes below

# name -> arguments of convert: every kind of state there is
KINDS = {
    'lsq': {'bits': 3},
    'pact': {'method': 'pact'},
    'qil': {'method': 'qil'},
    'fqn': {'method': 'fqn'},
    'int8': {'method': 'int8', 'bits': 4, 'first_last_bits': 4},
    'gdrq searching': {'method': 'gdrq', 'weight_options': {'alpha_mode': 'search', 'do_quant': False, 'group_size': 2},
                       'activation_options': {'do_quant': False}},
    'lsqplus': {'weight': 'lsqplus', 'activation': 'lsqplus'},
    'delayed': {'weight': 'int8', 'activation': 'int8', 'activation_options': {'delay_quant': 3}},
    'rules': {'rules': [{'pattern': '2', 'weight': 'none'}, {'pattern': '4', 'activation': 'none'}], 'exclude': ['6']},
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def fresh(**kwargs):
    net = build(**kwargs)               # noqa: F821
    net.initialize(init.Xavier())
    return net


def pictures(seed=0):
    return images(seed)                 # noqa: F821


def trainer_of(net):
    return gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.05, 'momentum': 0.9, 'wd': 1e-3},
                         kvstore=None)


def train(net, trainer, seeds):
    for seed in seeds:
        with autograd.record():
            loss = (net(pictures(seed)) ** 2).mean()
        loss.backward()
        trainer.step(1)


def trained(kind='int8', steps=2, ours=True, **kwargs):
    """A converted net whose every state has moved, and its trainer."""
    net = fresh(**kwargs)
    net(pictures())
    gq.convert(net, **KINDS[kind])
    gq.calibrate(net, [pictures()])
    trainer = trainer_of(net)
    train(net, trainer, range(steps))
    return net, trainer


def state(net):
    return {name: p._reduce().asnumpy() for name, p in net._collect_params_with_prefix().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


class Snapshot:
    """What a net is, to compare with later."""

    def __init__(self, net):
        self.net, self.before, self.values, self.output = net, self.now(net), state(net), net(pictures()).asnumpy()

    @staticmethod
    def now(net):
        return [(path, type(block), sorted(block._children)) for path, block in named_blocks(net)]

    def check(self):
        assert self.now(self.net) == self.before
        assert_same(state(self.net), self.values)
        np.testing.assert_array_equal(self.net(pictures()).asnumpy(), self.output)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.gq')


# ---------------------------------------------------------------- nothing is lost


@every_kind
def test_a_float_net_becomes_the_saved_one(seed, path, kind):
    net, _ = trained(kind)
    gq.save(net, path)
    other = fresh()
    assert gq.load(path, other) is other
    assert_same(state(other), state(net))
    assert {name: layer.config for name, layer in layers(other).items()} == {
        name: layer.config for name, layer in layers(net).items()}
    np.testing.assert_array_equal(other(pictures()).asnumpy(), net(pictures()).asnumpy())


@every_kind
def test_an_equally_converted_net_takes_the_values(seed, path, kind):
    net, _ = trained(kind)
    gq.save(net, path)
    other = gq.convert(fresh(), **KINDS[kind])
    if kind != 'gdrq searching':        # its number of groups depends on nothing but the net
        other.hybridize()
    gq.load(path, other)
    np.testing.assert_array_equal(other(pictures()).asnumpy(), net(pictures()).asnumpy())


@every_kind
def test_gluons_own_files_carry_the_whole_state(seed, path, kind):
    net, _ = trained(kind)
    net.save_parameters(path)
    other = gq.convert(fresh(), **KINDS[kind])
    other.load_parameters(path)
    assert_same(state(other), state(net))
    np.testing.assert_array_equal(other(pictures()).asnumpy(), net(pictures()).asnumpy())


def in_fresh_process(code, *arguments):
    head = 'import sys\nimport numpy as np\nfrom mxnet import nd\nfrom mxnet.gluon import nn\nimport gluonquant as gq\n'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', head + BUILD + textwrap.dedent(code), *arguments], check=True,
                   timeout=60, env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'})


def test_a_fresh_process_gives_the_same_outputs_from_our_file_and_from_gluons(seed, tmp_path):
    expected = {}
    for kind in KINDS:
        net, _ = trained(kind)
        gq.freeze_batchnorm(net)
        gq.freeze(net)
        name = tmp_path / kind.replace(' ', '_')
        gq.save(net, f'{name}.ours')
        net.save_parameters(f'{name}.gluon')
        (tmp_path / f'{name}.json').write_text(json.dumps(KINDS[kind]))
        expected[name] = net(pictures()).asnumpy()
    in_fresh_process('''
        import json
        from pathlib import Path
        for options in sorted(Path(sys.argv[1]).glob('*.json')):
            name = options.with_suffix('')
            net = gq.load(f'{name}.ours', build())
            np.save(f'{name}.ours.npy', net(images()).asnumpy())
            net.hybridize(static_alloc=True, static_shape=True)
            np.save(f'{name}.hybridized.npy', net(images()).asnumpy())
            net = gq.convert(build(), **json.loads(options.read_text()))
            net.load_parameters(f'{name}.gluon')
            np.save(f'{name}.gluon.npy', net(images()).asnumpy())
        ''', str(tmp_path))
    for name, out in expected.items():
        for way in ('ours', 'gluon', 'hybridized'):
            np.testing.assert_array_equal(np.load(f'{name}.{way}.npy'), out, err_msg=f'{name} {way}')


@every_kind
@pytest.mark.parametrize('way', ['ours', 'gluon'])
def test_training_goes_on_as_if_it_had_not_been_interrupted(seed, tmp_path, kind, way):
    net, trainer = trained(kind)
    path, states = str(tmp_path / 'net'), str(tmp_path / 'states')
    trainer.save_states(states)
    if way == 'ours':
        gq.save(net, path)
        other = gq.load(path, fresh())
    else:
        net.save_parameters(path)
        other = gq.convert(fresh(), **KINDS[kind])
        other.load_parameters(path)
    other_trainer = trainer_of(other)
    other_trainer.load_states(states)
    train(net, trainer, range(10, 15))
    train(other, other_trainer, range(10, 15))
    assert_same(state(other), state(net))


def test_the_number_of_delayed_steps_is_carried_over(seed, path):
    net, _ = trained('delayed', steps=2)
    gq.save(net, path)
    other = gq.load(path, fresh())
    quantizer = other[2].input_quantizer
    x = nd.array([[0.11, 0.52]])
    assert quantizer.value('steps')[0] == 2 and (quantizer(x) == x).asnumpy().all()
    train(other, trainer_of(other), [5])
    assert quantizer.value('steps')[0] == 3 and not (quantizer(x) == x).asnumpy().all()


@pytest.mark.parametrize('phase', [False, True])
def test_the_phase_of_gdrq_is_carried_over(seed, path, phase):
    net, _ = trained('gdrq searching')
    gq.set_phase(net, phase)
    gq.save(net, path)
    other = gq.load(path, fresh())
    assert other[2].weight_quantizer.value('phase')[0] == other[2].input_quantizer.value('phase')[0] == phase
    np.testing.assert_array_equal(other[2].weight_quantizer.value('ratio'), net[2].weight_quantizer.value('ratio'))


@pytest.mark.parametrize('mode', ['off', 'observe', 'quantize'])
def test_the_mode_is_carried_over(seed, path, mode):
    net, _ = trained('pact')
    gq.save(gq.set_mode(net, mode), path)
    other = gq.load(path, fresh())
    np.testing.assert_array_equal(other(pictures()).asnumpy(), net(pictures()).asnumpy())


@pytest.mark.parametrize('frozen', [True, False])
def test_frozen_batchnorm_is_carried_over(seed, path, frozen):
    net, _ = trained()
    gq.save(gq.freeze_batchnorm(net, frozen), path)
    other = gq.load(path, gq.freeze_batchnorm(fresh(), not frozen))
    before = other[3].running_mean.data().asnumpy()
    train(other, trainer_of(other), [7])
    assert np.array_equal(other[3].running_mean.data().asnumpy(), before) == frozen


@pytest.mark.parametrize('way', ['ours', 'gluon'])
@pytest.mark.parametrize('kind', ['pact', 'lsq', 'lsqplus', 'qil', 'int8'])
def test_frozen_ranges_do_not_move_after_loading(seed, path, kind, way):
    net, _ = trained(kind)
    gq.freeze(net)
    if way == 'ours':
        gq.save(net, path)
        other = gq.load(path, fresh())
    else:
        net.save_parameters(path)
        other = gq.convert(fresh(), **KINDS[kind])
        other.load_parameters(path)
    train(other, trainer_of(other), range(3))
    for name, quantizer in quantizers(other, 'activation').items():
        for parameter in quantizer._reg_params:
            np.testing.assert_array_equal(quantizer.value(parameter), quantizers(net)[name].value(parameter))


@pytest.mark.parametrize('way', ['ours', 'gluon'])
def test_ranges_saved_unfrozen_train_in_a_net_that_was_frozen(seed, path, way):
    net, _ = trained('lsq')
    if way == 'ours':
        gq.save(net, path)
    else:
        net.save_parameters(path)
    gq.freeze(net)
    gq.load(path, net) if way == 'ours' else net.load_parameters(path)
    before = net[2].input_quantizer.value('scale')
    train(net, trainer_of(net), range(3))
    assert net[2].input_quantizer.value('scale') != before


@pytest.mark.parametrize('way', ['ours', 'gluon'])
def test_an_uncalibrated_state_is_carried_over_to_a_calibrated_net(seed, path, way):
    net = fresh()
    net(pictures())
    gq.convert(net, bits=3)
    if way == 'ours':
        gq.save(net, path)
    else:
        net.save_parameters(path)
    gq.calibrate(net, [pictures()])
    gq.load(path, net) if way == 'ours' else net.load_parameters(path)
    assert not net[2].input_quantizer.calibrated
    with pytest.raises(RuntimeError, match='2.input_quantizer .*has no range yet'), autograd.record():
        net(pictures())


def test_loading_replaces_the_graph_of_a_hybridized_float_net(seed, path):
    net, _ = trained()
    gq.save(net, path)
    other = fresh()
    other.hybridize()
    other(pictures())
    np.testing.assert_array_equal(gq.load(path, other)(pictures()).asnumpy(), net(pictures()).asnumpy())
    assert other._active


def test_a_net_that_was_never_initialized_is_loaded(seed, path):
    net, _ = trained()
    gq.save(net, path)
    other = gq.load(path, build())              # noqa: F821
    np.testing.assert_array_equal(other(pictures()).asnumpy(), net(pictures()).asnumpy())


def test_an_uncalibrated_net_is_saved_and_loaded(seed, path):
    net = fresh()
    net(pictures())
    gq.save(gq.convert(net), path)
    assert not any(row.calibrated == 'yes' for row in gq.summary(gq.load(path, fresh())).rows)


def test_a_net_of_one_layer_is_saved_and_loaded(seed, path):
    net = nn.Dense(3, in_units=4)
    net.initialize()
    gq.calibrate(gq.convert(net), [nd.ones((1, 4))])
    gq.save(net, path)
    np.testing.assert_array_equal(gq.load(path, nn.Dense(3))(nd.ones((1, 4))).asnumpy(), net(nd.ones((1, 4))).asnumpy())


@pytest.mark.parametrize('kind', ['lsq', 'gdrq searching'])
def test_the_weights_alone_go_into_a_float_net_to_be_quantized_otherwise(seed, path, kind):
    net, _ = trained(kind)
    gq.save(net, path)
    made = gq.load_weights(path, build())       # noqa: F821
    assert not quantizers(made)
    saved = net._collect_params_with_prefix()
    for name, parameter in made._collect_params_with_prefix().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), saved[name].data().asnumpy())
    gq.convert(made, 2)
    with pytest.raises(ValueError, match='the net must be float'):
        gq.load_weights(path, made)


def test_weights_that_layers_share_come_from_the_file_of_an_attached_net(seed, path):
    def shared():
        net = nn.HybridSequential()
        first = nn.Dense(6, in_units=6)
        net.add(first, nn.Activation('relu'), nn.Dense(6, in_units=6, params=first.params))
        net.initialize(init.Xavier())
        return net
    net = shared()
    attached = gq.attach(net, 4)
    gq.calibrate(attached, [nd.ones((2, 6))])
    gq.save(attached, path)
    made = gq.load_weights(path, shared())
    np.testing.assert_array_equal(made[2].weight.data().asnumpy(), net[0].weight.data().asnumpy())


def test_weights_that_the_file_lacks_are_named_and_the_net_stays(seed, path):
    gq.save(trained('lsq')[0], path)
    other = nn.HybridSequential(prefix='other_')
    other.add(nn.Dense(3, in_units=5))
    other.initialize()
    before = other[0].weight.data().asnumpy()
    with pytest.raises(ValueError, match=r"Parameter '0.weight' has shape"):
        gq.load_weights(path, other)
    np.testing.assert_array_equal(other[0].weight.data().asnumpy(), before)


def test_the_path_may_be_a_path_object(seed, tmp_path):
    net, _ = trained()
    gq.save(net, tmp_path / 'net')
    assert len(layers(gq.load(tmp_path / 'net', fresh()))) == 4


def test_saving_leaves_no_other_file(seed, tmp_path):
    net, _ = trained()
    gq.save(net, str(tmp_path / 'net'))
    assert [file.name for file in tmp_path.iterdir()] == ['net']


def test_saving_changes_nothing(seed, path):
    net, _ = trained()
    before = Snapshot(net)
    gq.save(net, path)
    before.check()


@pytest.mark.parametrize('way', ['ours', 'gluon'])
def test_saving_waits_for_what_a_static_graph_still_writes(seed, path, way):
    """Such a graph does not tell MXNet which of its inputs it writes, so that reading them does not wait."""
    net = nn.HybridSequential()
    for _ in range(6):
        net.add(nn.Conv2D(16, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'))
    net.initialize(init.Xavier())
    x = nd.random.normal(shape=(16, 3, 32, 32))
    gq.convert(net, method='int8')
    gq.calibrate(net, [x])
    net.hybridize(static_alloc=True, static_shape=True)
    for size in (1, 2):
        nd.waitall()
        with autograd.record():
            loss = net(x * size).sum()
        loss.backward()
    gq.save(net, path) if way == 'ours' else net.save_parameters(path)
    nd.waitall()
    expected = state(net)
    with np.load(path) if way == 'ours' else nullcontext(nd.load(path)) as saved:
        for name, value in expected.items():
            if way == 'gluon' and 'running' in name:
                continue        # MXNet's own: save_parameters does not wait for BatchNorm
            got = saved[f'p:{name}'] if way == 'ours' else saved[name].asnumpy()
            np.testing.assert_array_equal(got, value, err_msg=name)


def test_the_file_is_an_archive_that_needs_no_pickle(seed, path):
    net, _ = trained()
    gq.save(net, path)
    with np.load(path, allow_pickle=False) as archive:
        assert json.loads(str(archive['plan']))['layers']['2']['float_class'] == 'Conv2D'
        np.testing.assert_array_equal(archive['p:2.weight'], net[2].weight.data().asnumpy())


# ---------------------------------------------------------------- saving refused


def test_a_float_net_is_not_saved(seed, path):
    with pytest.raises(ValueError, match=r'has no quantizer: save it with net.save_parameters\(path\)'):
        gq.save(fresh(), path)
    assert not os.path.exists(path)


def test_a_net_that_never_ran_is_not_saved_and_the_parameter_named(seed, path):
    with pytest.raises(ValueError, match="Parameter '0.weight' has no value yet: run one batch"):
        gq.save(gq.convert(fresh()), path)
    assert not os.path.exists(path)


@pytest.mark.parametrize('where', ['numpy.savez', 'os.fsync', 'os.replace'])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(seed, tmp_path, monkeypatch, where):
    net, _ = trained()
    path = tmp_path / 'net'
    gq.save(net, str(path))
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match='disk full'):
        gq.save(net, str(path))
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ['net']


def test_a_folder_that_does_not_exist_is_an_error(seed, tmp_path):
    net, _ = trained()
    with pytest.raises(FileNotFoundError, match='nowhere'):
        gq.save(net, str(tmp_path / 'nowhere' / 'net'))


# ---------------------------------------------------------------- loading refused: the net stays as it was


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    net, _ = trained()
    path = tmp_path_factory.mktemp('saved') / 'net'
    gq.save(net, str(path))
    return path


def refused(path, match, net=None, error=ValueError):
    net = fresh() if net is None else net
    net(pictures())
    before = Snapshot(net)
    with pytest.raises(error, match=match):
        gq.load(str(path), net)
    before.check()


def test_a_file_that_is_not_there_is_an_error(path):
    refused(path, 'net.gq', error=FileNotFoundError)


def test_every_truncated_file_is_refused(saved, tmp_path):
    whole = saved.read_bytes()
    short, net = tmp_path / 'short', fresh()
    net(pictures())
    before = Snapshot(net)
    for length in range(0, len(whole), 10):
        short.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'short: (not a complete file of gq.save \(|no plan inside)'):
            gq.load(str(short), net)
    before.check()


def test_a_flipped_bit_is_refused_or_changes_nothing(saved, tmp_path):
    """Some bytes of an archive carry no meaning: dates, attributes, lengths that stand elsewhere too."""
    whole = saved.read_bytes()
    flipped, net = tmp_path / 'flipped', fresh()
    net(pictures())
    before, reference = Snapshot(net), state(gq.load(str(saved), fresh()))
    rng, refusals = np.random.default_rng(0), 0
    directory = 8 * (len(whole) - 3000) + rng.choice(8 * 3000, 400, replace=False)
    for bit in [*rng.choice(8 * len(whole), 150, replace=False), *range(240), *directory]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            other = gq.load(str(flipped), net)
        except ValueError as error:
            assert str(error).startswith(f'{flipped}: '), bit
            refusals += 1
            continue
        assert_same(state(other), reference)
        net = fresh()
        net(pictures())
        before = Snapshot(net)
    before.check()
    assert refusals > 200


def foreign(kind, tmp_path):
    path = tmp_path / 'foreign'
    if kind == 'params':
        net = fresh()
        net(pictures())
        net.save_parameters(str(path))
    elif kind == 'random':
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == 'pickle':
        np.save(str(path), np.array([{}], dtype=object), allow_pickle=True)
        path = tmp_path / 'foreign.npy'
    elif kind == 'npy':
        np.save(str(path), np.ones(3))
        path = tmp_path / 'foreign.npy'
    else:
        arrays = {'no plan': {'weight': np.ones(3)}, 'another plan': {'plan': np.array('[1, 2]')},
                  'a plan without layers': {'plan': np.array('{"version": 1}')}, 'no JSON': {'plan': np.array('{')},
                  'a plan of numbers': {'plan': np.ones(3)},
                  'another version': {'plan': np.array('{"version": 99, "layers": {}, "frozen_batchnorm": []}')},
                  'an unknown field': {'plan': np.array(json.dumps({'version': 1, 'frozen_batchnorm': [], 'layers': {
                      '0': {'float_class': 'Conv2D', 'weight': {'method': 'int8', 'bits': 8}, 'colour': 1,
                            'activation': {'method': 'int8', 'bits': 8}}}}))}}[kind]
        path = tmp_path / 'foreign.npz'
        np.savez(str(path), **arrays)
    return path


@pytest.mark.parametrize('kind, message', [
    ('params', 'not a complete file'), ('random', 'not a complete file'), ('pickle', 'not a complete file'),
    ('npy', 'not a complete file|no plan'), ('no plan', 'no plan inside, so this is not a file of gq.save'),
    ('another plan', ''), ('a plan without layers', ''), ('no JSON', 'not a complete file'), ('a plan of numbers', ''),
    ('another version', 'plan version 99, this library reads 1'), ('an unknown field', '')])
def test_a_foreign_file_is_refused_by_name(tmp_path, kind, message):
    refused(foreign(kind, tmp_path), rf'foreign\S*: {message}')


def test_gluon_refuses_our_file(saved):
    with pytest.raises(Exception, match='(?i)invalid|format|header|parameter'):
        fresh().load_parameters(str(saved))


@pytest.mark.parametrize('other, message', [
    ({'classes': 5}, r"net: Parameter '6.weight' has shape \(3, 16\) in the file, but \(5, 16\) in the net"),
    ({'channels': 8}, r"Parameter '2.weight' has shape \(6, 4, 3, 3\) in the file, but \(8, 4, 3, 3\) in the net")])
def test_a_net_of_other_sizes_refuses_the_first_parameter_that_differs(seed, saved, other, message):
    refused(saved, message, fresh(**other))


@pytest.mark.parametrize('other', [{'classes': 5}, {'channels': 8}])
def test_a_converted_net_of_other_sizes_refuses_too(seed, saved, other):
    net = fresh(**other)
    net(pictures())
    refused(saved, r"Parameter '\d.weight' has shape", gq.convert(net, **KINDS['int8']))


def test_a_net_of_other_layers_refuses_the_first_layer_that_differs(seed, saved):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Dense(6))
    net.initialize()
    refused(saved, "layer '2' is a Conv2D in the file, but Dense in the net", net)


def test_a_shorter_net_refuses_the_layer_it_lacks(seed, saved):
    refused(saved, "layer '6' is a Dense in the file, but nothing in the net", fresh()[:6])


def test_a_longer_net_refuses_the_parameter_the_file_lacks(seed, saved):
    net = fresh()
    with net.name_scope():
        net.add(nn.BatchNorm())
    net.initialize()
    refused(saved, r"Parameter '7\.\w+' of the net is missing in the file", net)


def test_a_net_without_a_bias_refuses_the_parameter_that_is_too_many(seed, path):
    net = nn.Dense(3, in_units=4)
    net.initialize()
    gq.save(gq.convert(net), path)
    other = nn.Dense(3, in_units=4, use_bias=False)
    other.initialize()
    with pytest.raises(ValueError, match="Parameter 'bias' of the file is missing in the net"):
        gq.load(path, other)
    assert type(other) is nn.Dense and list(other._collect_params_with_prefix()) == ['weight']


@pytest.mark.parametrize('options', [{'bits': 5, 'method': 'int8', 'first_last_bits': 4}, {'bits': 4},
                                     {'method': 'pact'}])
def test_a_net_converted_in_another_way_refuses_the_first_layer(seed, saved, options):
    net = fresh()
    net(pictures())
    refused(saved, r"layer '\d' was saved as LayerConfig\(.*the net has LayerConfig.*Load into a float net",
            gq.convert(net, **options))


def test_a_net_with_more_quantized_layers_refuses_the_first_of_them(seed, path):
    net, _ = trained('rules')
    gq.save(net, path)
    other = fresh()
    other(pictures())
    refused(path, "layer '6' is quantized in the net, but float in the file",
            gq.convert(other, rules=KINDS['rules']['rules']))


def test_a_net_of_another_type_is_refused(seed, saved):
    net = fresh()
    net.cast('float16')
    with pytest.raises(ValueError, match="Parameter '0.weight' is float32 in the file, but float16 in the net; cast"):
        gq.load(str(saved), net)
    assert type(net[0]) is nn.Conv2D


def test_a_refused_net_can_be_converted_afterwards(seed, saved):
    net = fresh(classes=5)
    net(pictures())
    with pytest.raises(ValueError, match="'6.weight' has shape"):
        gq.load(str(saved), net)
    expected = list(gq.convert(fresh(classes=5)).collect_params())
    assert list(gq.convert(net).collect_params()) == expected
