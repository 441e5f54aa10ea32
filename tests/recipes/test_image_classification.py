"""The main job from the command line, on a few tiny images."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mxnet import nd

import data
import image_classification
import report
import torch_nets
from options import contexts, parse_args
from quantization import widths
from tiny import write_folder
from workers import Workers

ROOT = str(Path(__file__).parents[2])
OPTIONS = {'--float-epochs': 2, '--num-epochs': 4, '--batch-size': 8, '--calibration-batches': 1,
           '--float-lr': 0.01, '--lr': 0.01, '--lr-mode': 'sine', '--freeze-bn-after': 0.5}


def command(images, out, *more, **changed):
    options = {**OPTIONS, '--data-dir': images, '--save-dir': out, **changed}
    words = [str(word) for option in options.items() if option[1] is not None for word in option]
    return [sys.executable, os.path.join(ROOT, 'recipes', 'image_classification.py'), *words, *more]


def environment():
    return {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}


def execute(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), env=environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


def call(*args, **kwargs):
    """The same command inside this process."""
    options = parse_args(command(*args, **kwargs)[2:])
    os.makedirs(options.save_dir, exist_ok=True)
    image_classification.run(options, Workers(contexts=contexts(options)))


def results(out):
    with open(os.path.join(out, 'results.json')) as file:
        return json.load(file)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """(image folder, save folder, output) of a run that nothing interrupts."""
    directory = tmp_path_factory.mktemp('straight')
    images = write_folder(directory / 'images')
    done = execute(images, directory / 'run')
    assert done.returncode == 0, done.stdout
    return images, directory / 'run', done.stdout


def assert_same_weights(one, other):
    first, second = np.load(one / 'quantized.params'), np.load(other / 'quantized.params')
    assert first.files == second.files
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_the_run_leaves_a_table_results_and_a_picture(straight):
    _, out, text = straight
    found = results(out)
    assert set(found['accuracy']) == {'float', 'calibrated only', 'fine-tuned'}
    for stage, top1 in found['accuracy'].items():
        assert f'{stage:18}{top1:8.4f}' in text
    assert '\ncifar_resnet20_v1, W4A4, ' in text
    assert 7 < found['bytes']['float'] / found['bytes']['quantized'] < 8.1      # 4 bits, 8 at both ends
    assert found['versions']['mxnet'] == '1.9.1' and found['seed'] == 0
    with open(out / 'curves.png', 'rb') as picture:
        assert picture.read(4) == b'\x89PNG'
    assert all(np.isfinite(value.asnumpy()).all() for value in nd.load(str(out / 'float.params')).values())


def test_a_title_has_the_bits_of_weights_and_of_activations():
    assert widths(parse_args([])) == 'W4A4'
    assert widths(parse_args(['--bits', '8', '--weight-bits', '3'])) == 'W3A8'
    assert widths(parse_args(['--bits', '8', '--activation-bits', '2'])) == 'W8A2'


def test_a_picture_shows_the_stages_there_were(tmp_path, monkeypatch):
    monkeypatch.setattr(report.plt, 'close', lambda figure: None)
    history = [{'stage': 'quantized', 'loss': loss, 'score': score} for loss, score in ((4.0, None), (0.5, 0.75))]
    report.plot(tmp_path / 'curves.png', history, {'float': 0.8, 'calibrated only': 0.1}, 'title', {'loss': 'all'},
                {'score': 'validation'}, 'mAP')
    left, right = report.plt.gcf().axes
    assert left.get_title() == 'quantized' and left.get_yscale() == 'log' and right.get_ylabel() == 'mAP, %'
    line = next(line for line in right.lines if line.get_label() == 'validation')
    assert line.get_xydata().tolist() == [[2, 75]]
    monkeypatch.undo()
    report.plt.close('all')


def test_tensorboard_gets_curves_ranges_and_clipped_shares_once_for_each_epoch(straight, tmp_path):
    struct = pytest.importorskip('tensorboardX.proto.event_pb2')
    images, out, _ = straight
    start = {'--float-params': out / 'float.params', '--float-epochs': None, '--num-epochs': 2}
    call(images, tmp_path, '--tensorboard', **start)
    found = {}
    for path in (tmp_path / 'tensorboard').iterdir():
        data = path.read_bytes()
        while data:         # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], 'little')
            event, data = struct.Event.FromString(data[12:12 + size]), data[16 + size:]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    accuracies = [row['val_accuracy'] for row in results(tmp_path)['history']]
    assert [step for step, _ in found['quantized/loss']] == [1, 2]
    assert [value for _, value in found['quantized/val_accuracy']] == pytest.approx(accuracies)
    shares = [tag for tag in found if tag.startswith('clipped/')]
    assert len(shares) == len([tag for tag in found if tag.startswith('high/')]) > 40
    assert all(0 <= value < 1 for tag in shares for _, value in found[tag])


def test_the_sine_schedule_rises_and_falls_to_zero(straight):
    rows = [row for row in results(straight[1])['history'] if row['stage'] == 'quantized']
    total = 4 * 3           # epochs times batches of 8 out of 24
    for epoch, row in enumerate(rows):
        assert row['lr_first'] == pytest.approx(0.01 * math.sin(math.pi * (3 * epoch + 1) / total))
        assert row['lr_last'] == pytest.approx(0.01 * math.sin(math.pi * (3 * epoch + 3) / total), abs=1e-9)


def test_a_killed_run_resumes_to_the_same_bits(straight, tmp_path):
    """Kill at two random moments between the first checkpoint and the end, then finish with a data worker."""
    images, expected, _ = straight
    moments = random.Random()
    for _ in range(2):
        process = subprocess.Popen(command(images, tmp_path, '--resume'), env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = set(os.listdir(tmp_path / 'checkpoints')) if (tmp_path / 'checkpoints').exists() else set()
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:
            if (tmp_path / 'checkpoints').exists() and set(os.listdir(tmp_path / 'checkpoints')) - before:
                break
            time.sleep(0.01)
        delay = moments.uniform(0, 0.7)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = execute(images, tmp_path, '--resume', '-j', '1')
    assert done.returncode == 0, done.stdout
    assert 'continuing from' in done.stdout, f'killed {delay:.3f} s after the first new checkpoint'
    assert_same_weights(tmp_path, expected)
    keys = ('stage', 'epoch', 'loss', 'accuracy', 'val_accuracy', 'lr_first', 'lr_last')
    for mine, theirs in zip(results(tmp_path)['history'], results(expected)['history']):
        assert [mine[key] for key in keys] == [theirs[key] for key in keys]


def test_interrupting_says_how_to_continue(straight, tmp_path):
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)     # jobs in the background ignore it
    process = subprocess.Popen(command(straight[0], tmp_path), env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, preexec_fn=heeded)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'float epoch 1/2' in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    text = ''.join(lines)
    assert 'continue with' in text and text.rstrip().endswith('--resume') and 'Traceback' not in text

    with pytest.raises(SystemExit, match=r'holds an unfinished run \(float, epoch 1\)'):
        call(straight[0], tmp_path)
    with pytest.raises(SystemExit, match=r'--lr is 0.5, but the run in .* was started with 0.01'):
        call(straight[0], tmp_path, '--resume', **{'--lr': 0.5})


def test_a_float_checkpoint_is_quantized_without_training(straight, tmp_path):
    images, out, _ = straight
    start = {'--float-params': out / 'float.params', '--float-epochs': None, '--num-epochs': 0}
    call(images, tmp_path, **start)
    expected = results(out)['accuracy']
    assert results(tmp_path)['accuracy'] == {key: expected[key] for key in ('float', 'calibrated only')}


@pytest.mark.parametrize('changed, message', [
    ({'--data-dir': 'nowhere'}, 'nowhere has neither train.rec nor train/'),
    ({'--model': 'resnet2_v9'}, '--model resnet2_v9 is not in the gluoncv model zoo'),
    ({'--method': 'lsqq'}, "'lsqq'.*lsq"),
    ({'--float-lr': 1e30}, 'the loss is .* Pass a smaller --float-lr than 1e\\+30'),
])
def test_a_wrong_value_is_explained(tmp_path, folder, changed, message):
    with pytest.raises(SystemExit, match=message):
        call(folder, tmp_path, **changed)


@pytest.mark.parametrize('changed, message', [
    ({'--float-epochs': None}, 'there is no float network to quantize'),
    ({'--float-params': 'missing.params'}, '--float-params missing.params: no such file'),
    ({'--batch-size': 0}, '--batch-size 0 is below 1'),
    ({'--dataset': 'digits'}, '--dataset digits comes with scikit-learn'),
    ({'--lr-decay-epoch': 'ten'}, '--lr-decay-epoch ten is not a list of epochs'),
])
def test_a_wrong_option_is_explained(tmp_path, capsys, changed, message):
    with pytest.raises(SystemExit):
        call('images', tmp_path, **changed)
    assert message in capsys.readouterr().err


def test_a_run_starts_from_the_weights_of_another_and_learns_from_the_float_net(straight, tmp_path):
    images, out, _ = straight
    options = {'--float-params': out / 'float.params', '--float-epochs': None, '--num-epochs': 2, '--bits': 2}
    more = ['--start-from', str(out), '--teacher', 'float', '--label-smoothing', '0.1', '--warmup-epochs', '1']
    call(images, tmp_path / 'run', *more, **options)
    found = results(tmp_path / 'run')
    assert found['epochs'] == 4 + 2 and found['accuracy']['float'] == results(out)['accuracy']['float']
    first, second = (row for row in found['history'])
    assert first['lr_first'] < first['lr_last']
    call(images, tmp_path / 'alone', *more[2:], **options)
    assert results(tmp_path / 'alone')['history'][0]['loss'] != first['loss']


def test_images_held_out_are_validated_on_and_never_trained_on(straight, tmp_path, monkeypatch):
    parts, make_loaders = [], data.make_loaders
    monkeypatch.setattr(data, 'make_loaders', lambda *args: parts.extend(args[:2]) or make_loaders(*args))
    options = parse_args(command(straight[0], tmp_path, '--hold-out', '8')[2:])
    loaders, _ = image_classification.read_data(options)
    assert (loaders.train_count, loaders.val_count) == (16, 8)
    image_classification.read_data(parse_args(command(straight[0], tmp_path)[2:]))
    rest, held, every, _ = ({part.read(i)[0].tobytes() for i in range(len(part))} for part in parts)
    assert rest | held == every and not rest & held and len(held) == 8


@pytest.mark.parametrize('more, message', [
    (['--start-from', 'nowhere'], 'there is no quantized.params'),
    (['--teacher-params', 'file'], 'pass its name, too'),
    (['--torch-params', 'nowhere'], 'no such file'), (['--float-params', __file__, '--pretrained'], 'Leave one out'),
    (['--batch-size', '9', '--num-cpus', '2'], 'cannot be divided'), (['--hold-out', '-1'], 'below 0')])
def test_options_that_make_no_sense_are_refused(folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        call(folder, tmp_path, *more)
    assert message in capsys.readouterr().err


def test_a_teacher_that_cannot_be_had_and_too_many_held_out_images_are_errors(folder, tmp_path):
    with pytest.raises(SystemExit, match='--teacher resnet0 cannot be had'):
        call(folder, tmp_path, '--teacher', 'resnet0')
    with pytest.raises(SystemExit, match='Pass at most 16'):
        call(folder, tmp_path / 'other', '--hold-out', '20')


def test_a_run_starts_from_weights_of_torch(straight, tmp_path):
    safetensors = pytest.importorskip('safetensors.numpy')
    made = torch_nets.Net(np.random.default_rng(0))
    torch_nets.resnet(made, nd.zeros((2, 3, 32, 32)), (2, 2, 2, 2), bottleneck=False, classes=3)
    safetensors.save_file(made.state, str(tmp_path / 'torch.safetensors'))
    call(straight[0], tmp_path / 'run', **{'--torch-params': tmp_path / 'torch.safetensors', '--float-epochs': None,
                                           '--model': 'resnet18_v1b', '--num-epochs': 0})
    assert set(results(tmp_path / 'run')['accuracy']) == {'float', 'calibrated only'}
    with pytest.raises(SystemExit, match='--torch-params .*: .*layer'):
        call(straight[0], tmp_path / 'other', **{'--torch-params': tmp_path / 'torch.safetensors',
                                                 '--float-epochs': None, '--num-epochs': 0})


def test_two_contexts_train_the_net_that_one_does(straight, tmp_path):
    images, out, _ = straight
    start = {'--float-params': out / 'float.params', '--float-epochs': None, '--freeze-bn-after': 0, '--num-epochs': 1}
    for count in '12':
        call(images, tmp_path / count, '--num-cpus', count, '--lr', '0.001', **start)
    one, two = (np.load(tmp_path / name / 'quantized.params') for name in '12')
    assert any((one[name] != np.load(out / 'quantized.params')[name]).any() for name in one.files if name[:2] == 'p:')
    for name in one.files:
        if name.endswith(('weight', 'gamma', 'beta', 'bias')):      # codes may flip where rounding differs
            np.testing.assert_allclose(two[name], one[name], atol=2e-4, err_msg=name)


def test_fewer_images_than_contexts_are_validated(straight, tmp_path):
    images = write_folder(tmp_path / 'images', val=3)
    call(images, tmp_path / 'run', '--num-cpus', '4', **{'--num-epochs': 1})
    assert results(tmp_path / 'run')['accuracy']['fine-tuned'] * 3 % 1 == pytest.approx(0, abs=1e-9)
