"""A finished run measured again."""
import json

import numpy as np
import pytest

import evaluate
import gluonquant as gq
import image_classification
import tiny
from options import parse_args
from workers import Workers


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with one run below it, at 2 bits with ends at 2 bits, which matter."""
    folder = tmp_path_factory.mktemp('runs')
    images = tiny.write_folder(folder / 'images')
    words = ['--data-dir', images, '--save-dir', folder / 'w2', '--float-epochs', 1, '--num-epochs', 1, '--bits', 2,
             '--batch-size', 8, '--calibration-batches', 1, '--input-size', 16, '--first-last-bits', 2]
    image_classification.run(parse_args([str(word) for word in words]), Workers())
    return folder


def measured(runs, out, *words):
    args = evaluate.parse_args(['--run', str(runs), '--save-dir', str(out), *words])
    for name, run in evaluate.runs(args.run).items():
        evaluate.measure(run, out / name, args)
    with open(out / 'w2' / 'results.json') as file:
        return json.load(file)


def test_a_run_gives_its_accuracy_again_and_all_else_stays(runs, tmp_path):
    found = measured(runs, tmp_path)
    with open(runs / 'w2' / 'results.json') as file:
        before = json.load(file)
    assert found['accuracy'] == before['accuracy'] and found['options'] == before['options']
    assert found['float_layers'] == [] and '.' in (tmp_path / 'w2' / 'train.log').read_text()


def test_the_ends_are_float_and_nothing_else(runs, tmp_path):
    assert measured(runs, tmp_path, '--ends-float')['float_layers'] == ['features.0', 'output']
    _, loaders, net = evaluate.deploy.load_run(runs / 'w2', None)
    data = next(iter(loaders.val))[0]
    quantized = net(data).asnumpy()
    evaluate.leave_ends_float(net)
    assert not np.array_equal(net(data).asnumpy(), quantized)
    modes = {path: float(quantizer.mode.data().asscalar())
             for path, quantizer in gq.layers.quantizers(net).items()}
    assert {path.rpartition('.')[0] for path, mode in modes.items() if mode == 0} == {'features.0', 'output'}


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(['--run', str(tmp_path), '--save-dir', 'x'])
    assert 'Let that run end first' in capsys.readouterr().err
