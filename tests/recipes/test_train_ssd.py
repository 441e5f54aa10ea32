"""A detector's run from the command line's words to its table, on a few small pictures."""
import json
import os
import sys

import mxnet as mx
import numpy as np
import pytest
from gluoncv.loss import SSDMultiBoxLoss
from gluoncv.model_zoo import get_model
from mxnet import autograd

import detection_data
import gluonquant as gq
import train_ssd
from ssd_options import parse_args
from workers import Workers

OPTIONS = {'--network': 'mobilenet0.25', '--data-shape': 64, '--train-images': 8, '--val-images': 6,
           '--batch-size': 4, '--epochs': 2, '--num-epochs': 1, '--calibration-batches': 1, '--log-interval': 0}
CLASSES = [str(digit) for digit in range(10)]


def arguments(out=None, *more, **changed):
    options = {**OPTIONS, '--save-dir': out, **changed}
    return parse_args([*[str(word) for item in options.items() if item[1] is not None for word in item], *more])


def call(out, *more, **changed):
    args = arguments(out, *more, **changed)
    os.makedirs(args.save_dir, exist_ok=True)
    train_ssd.run(args)


def results(out):
    with open(os.path.join(out, 'results.json')) as file:
        return json.load(file)


@pytest.fixture(scope='module')
def net():
    made = train_ssd.make_net(arguments(), CLASSES)
    train_ssd.complete(made, arguments())
    return made


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """Save folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp('straight')
    call(out)
    return out


class Stop(Exception):
    pass


def stop_after(monkeypatch, count):
    """The run ends by `Stop` when checkpoint number `count` has been written."""
    write = train_ssd.checkpoint.write

    def writing(folder, stage, epoch, state, writers):
        write(folder, stage, epoch, state, writers)
        if state['step'] == count:
            raise Stop

    monkeypatch.setattr(train_ssd.checkpoint, 'write', writing)


def assert_same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        assert value.asnumpy().tobytes() == other[name].asnumpy().tobytes(), name


def test_a_resumed_float_run_equals_one_without_a_stop(monkeypatch, tmp_path):
    """Also where quantization begins, which stops both: float.params is written before."""
    def stop(*args):
        raise Stop

    monkeypatch.setattr(train_ssd, 'quantize', stop)
    for name, steps in (('straight', ()), ('resumed', (1, 2))):
        for step in steps:
            with monkeypatch.context() as patch:
                stop_after(patch, step)
                with pytest.raises(Stop):
                    call(tmp_path / name, '--resume')
        with pytest.raises(Stop):
            call(tmp_path / name, '--resume')
    found = [mx.nd.load(str(tmp_path / name / 'float.params')) for name in ('straight', 'resumed')]
    assert_same(*found)
    histories = [train_ssd.checkpoint.latest(tmp_path / name / 'checkpoints')[1]['history']
                 for name in ('straight', 'resumed')]
    for mine, theirs in zip(*histories):
        assert {**mine, 'images_per_s': 0} == {**theirs, 'images_per_s': 0}
    assert [row['epoch'] for row in histories[0]] == [1, 2] and histories[0][1]['mean_ap'] is not None
    with pytest.raises(SystemExit, match=r'--lr is 0\.5, but the run in .* was started with 0\.01'):
        call(tmp_path / 'straight', '--resume', **{'--lr': 0.5})
    with pytest.raises(SystemExit, match='holds an unfinished run .*float, epoch 2'):
        call(tmp_path / 'straight')


def test_the_run_leaves_results_and_pictures(straight):
    found = results(straight)
    assert list(found['mean_ap']) == ['float', 'calibrated only', 'fine-tuned']
    for row in found['mean_ap'].values():
        assert list(row) == [*CLASSES, 'mAP'] and 0 <= row['mAP'] <= 1
    assert 3.5 < found['bytes']['float'] / found['bytes']['quantized'] < 4.1
    assert found['seed'] == 233 and found['versions']['mxnet'] == '1.9.1' and len(found['history']) == 3
    for name in ('curves.png', 'detections.png'):
        assert (straight / name).read_bytes()[:4] == b'\x89PNG'
    made = train_ssd.make_net(arguments(), CLASSES)
    gq.load(str(straight / 'quantized.params'), made)
    assert len(made(mx.nd.zeros((1, 3, 64, 64)))) == 3


def test_a_resumed_quantized_run_equals_one_without_a_stop(straight, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)            # two float epochs, then the calibrated net
        with pytest.raises(Stop):
            call(tmp_path)
    call(tmp_path, '--resume')
    one, other = (np.load(folder / 'quantized.params') for folder in (tmp_path, straight))
    assert one.files == other.files     # but for numbers of blocks in the plan, which count up in a process
    assert all(one[name].tobytes() == other[name].tobytes() for name in one.files if one[name].dtype.kind == 'f')
    assert results(tmp_path)['mean_ap'] == results(straight)['mean_ap']


@pytest.mark.parametrize('more', [('--fold', 'frozen', '--freeze-bn'), ('--mode', 'imperative'),
                                  ('--bits', '4', '--method', 'lsq')], ids=' '.join)
def test_ways_to_quantize(straight, tmp_path, more):
    call(tmp_path, *more, **{'--epochs': 0, '--float-params': straight / 'float.params'})
    assert list(results(tmp_path)['mean_ap']) == ['float', 'calibrated only', 'fine-tuned']


def test_a_graph_is_quantized(straight, tmp_path):
    call(tmp_path, '--graph', **{'--epochs': 0, '--float-params': straight / 'float.params'})
    assert list(results(tmp_path)['mean_ap']) == ['float', 'calibrated only', 'fine-tuned']


def test_validation_fills_up_its_last_batch(net):
    data = detection_data.read(arguments())
    anchors = train_ssd.complete(net, arguments())
    found = []
    for batch_size in (2, 4):           # of 6 pictures
        loaders = detection_data.make_loaders(data.train, data.val, 10, anchors, 64, batch_size, 0, 1)
        parts = list(train_ssd.detect(net, loaders.val, Workers(), 'hybrid', 64))
        found.append([np.concatenate([part[i] for part in parts]) for i in range(3)])
    for one, other in zip(*found):
        assert len(one) == 6
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    net.hybridize(False)


def test_a_step_without_any_object_is_finite(net):
    """Losses are 0 and gradients finite; the next batch trains as ever."""
    args = arguments()
    anchors = train_ssd.complete(net, args)
    data = mx.nd.random.normal(shape=(2, 3, 64, 64))
    batches = [[data, mx.nd.zeros((2, anchors.shape[1])), mx.nd.zeros((2, anchors.shape[1], 4))] for _ in range(2)]
    batches[1][1][:, :5] = 1
    workers = Workers()
    trainer = workers.trainer(net, 'sgd', {'learning_rate': 1e-3, 'momentum': 0.9})
    row = train_ssd.train_epoch(net, trainer, batches[:1], workers, 'empty', 0)
    assert row['cross_entropy'] == row['smooth_l1'] == 0
    row = train_ssd.train_epoch(net, trainer, batches, workers, 'both', 0)
    assert 0 < row['cross_entropy'] < 100 and np.isfinite(row['smooth_l1'])
    for parameter in net.collect_params().values():
        assert np.isfinite(parameter.data().asnumpy()).all(), parameter.name


def test_batchnorm_starts_from_ones_and_zeros_and_anchors_are_gluoncvs():
    made = train_ssd.make_net(arguments(), CLASSES)
    anchors = train_ssd.complete(made, arguments())
    starts = {'gamma': 1, 'var': 1, 'beta': 0, 'mean': 0, 'bias': 0}
    for name, parameter in made.collect_params().items():
        for ending, value in starts.items():
            if name.endswith(ending):
                assert (parameter.data().asnumpy() == value).all(), name
    with autograd.train_mode():
        _, _, expected = made(mx.nd.zeros((1, 3, 64, 64)))
    assert np.array_equal(anchors.asnumpy(), expected.asnumpy()) and anchors.asnumpy().any()


def test_anchors_are_as_large_as_objects(net):
    """Each object of the set has an anchor with an IoU of 0.5 or nearly so, so that it is trained on."""
    anchors = train_ssd.complete(net, arguments())
    corners = mx.nd.concat(anchors[0, :, :2] - anchors[0, :, 2:] / 2, anchors[0, :, :2] + anchors[0, :, 2:] / 2, dim=1)
    train, best = detection_data.read_pasted(64, (30, 1))[0], []
    for i in range(30):
        _, boxes = train.read(i)
        if len(boxes):
            best += mx.nd.contrib.box_iou(mx.nd.array(boxes[:, :4]), corners).max(axis=1).asnumpy().tolist()
    assert min(best) > 0.35 and np.mean(best) > 0.55


def test_base_parameters_reach_the_detector_without_the_classifier(tmp_path):
    base = get_model('mobilenet0.25', classes=3)
    base.initialize()
    base(mx.nd.zeros((1, 3, 64, 64)))
    path = str(tmp_path / 'base.params')
    base.save_parameters(path)
    made = train_ssd.make_net(arguments(**{'--base-params': path}), CLASSES)
    train_ssd.complete(made, arguments())
    inside = made.features.collect_params()
    given = {name[len(base.prefix):]: value for name, value in base.collect_params().items()}
    equal = [ending for ending, value in given.items() for name in inside if name.endswith('_' + ending)
             and np.array_equal(inside[name].data().asnumpy(), value.data().asnumpy())]
    assert len(set(equal)) == len(given) - 2        # the classifier's weight and bias
    mx.nd.save(path, {'wrong': mx.nd.zeros(1)})
    with pytest.raises(SystemExit, match='--base-params .* is not in it. Pass parameters of mobilenet0.25'):
        train_ssd.make_net(arguments(**{'--base-params': path}), CLASSES)


def test_a_resnet_takes_imagenette(shared):
    path = str(shared / 'weights' / 'resnet18_v1b_imagenette.params')
    made = train_ssd.make_net(arguments(**{'--network': 'resnet18_v1b', '--base-params': path}), CLASSES)
    train_ssd.complete(made, arguments())
    first = next(value for name, value in made.features.collect_params().items() if name.endswith('conv0_weight'))
    assert np.array_equal(first.data().asnumpy(), mx.nd.load(path)['conv1.weight'].asnumpy())


def test_nets_of_the_zoo_are_those_of_gluoncv():
    made = train_ssd.make_net(arguments(**{'--data-shape': 300}), ['a', 'b'])
    assert made.num_classes == 2 and len(made.class_predictors) == 6
    with autograd.train_mode():
        assert made(mx.nd.zeros((1, 3, 64, 64)))[0].shape[2] == 3
    voc = train_ssd.make_net(arguments(**{'--data-shape': 300, '--dataset': 'voc'}), None)
    assert voc.num_classes == 20


def test_losses_are_those_of_gluoncv(net):
    anchors = train_ssd.complete(net, arguments())
    count = anchors.shape[1]
    data, classes = mx.nd.random.normal(shape=(2, 3, 64, 64)), mx.nd.zeros((2, count))
    classes[:, :3] = 4
    boxes = mx.nd.ones((2, count, 4))
    with autograd.train_mode():
        scores, places, _ = net(data)
    _, ce, l1 = SSDMultiBoxLoss()([scores], [places], [classes], [boxes])
    trainer = Workers().trainer(net, 'sgd', {'learning_rate': 0})
    row = train_ssd.train_epoch(net, trainer, [[data, classes, boxes]], Workers(), 'one', 0)
    assert row['cross_entropy'] == pytest.approx(float(ce[0].sum().asscalar()), rel=1e-4)
    assert row['smooth_l1'] == pytest.approx(float(l1[0].sum().asscalar()), rel=1e-4)


@pytest.mark.parametrize('words, message', [
    (['--target', 'onnxruntime'], 'pass --graph, too'),
    (['--dataset', 'voc', '--canvas-dir', '.'], '--canvas-dir is for --dataset pasted'),
    (['--base-params', __file__, '--float-params', __file__], '--float-params and --base-params both'),
    (['--float-params', 'absent'], '--float-params absent: no such file'),
    (['--dataset-root', 'absent'], '--dataset-root absent: no such folder'),
    (['--epochs', '0'], 'there is no float detector'),
    (['--gpus', 'a'], '--gpus a is not a list of GPUs'),
    (['--lr-decay-epoch', '1;2'], 'is not a list of epochs'),
    (['--batch-size', '0'], '--batch-size 0 is below 1'),
    (['--val-interval', '0'], '--val-interval 0 is below 1')])
def test_wrong_options_say_what_to_do(capsys, words, message):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert message in capsys.readouterr().err


def test_options_are_those_of_gluoncvs_script():
    args = parse_args(['-j', '2', '--gpus', '', '--lr-decay-epoch', '160,200', '--dataset', 'voc'])
    assert args.num_workers == 2 and args.gpus == [] and args.lr_decay_epoch == [160, 200] and args.epochs == 240
    assert parse_args(['--float-params', __file__]).epochs == 0


@pytest.mark.parametrize('changed, message', [
    ({'--network': 'resnet18_v1'}, 'below 300 pixels there are only resnet18_v1b and mobilenet0.25'),
    ({'--network': 'nothing', '--data-shape': 300}, '--network nothing at --data-shape 300'),
    ({'--batch-size': 16}, '--batch-size 16 is larger than the 8 training pictures'),
    ({'--float-params': __file__}, 'does not fit the detector')])
def test_what_does_not_fit_is_said(tmp_path, changed, message):
    with pytest.raises(SystemExit, match=message):
        call(tmp_path, **changed)


def test_interrupting_says_how_to_continue(monkeypatch, tmp_path, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ssd, 'run', interrupt)
    monkeypatch.setattr(sys, 'argv', ['train_ssd.py', '--save-dir', str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        train_ssd.main()
    assert error.value.code == 130 and 'train_ssd.py --save-dir' in capsys.readouterr().err
