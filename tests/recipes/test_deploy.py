"""From a finished run to files and a proof, on a few tiny images."""
import json

import numpy as np
import pytest
from mxnet import nd

import deploy
import gluonquant as gq
import image_classification
from options import parse_args
from workers import Workers


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run, and its images."""
    import tiny
    images = tiny.write_folder(tmp_path_factory.mktemp('images'))
    out = tmp_path_factory.mktemp('run')
    options = ['--data-dir', images, '--save-dir', out, '--float-epochs', 1, '--num-epochs', 1, '--batch-size', 8,
               '--calibration-batches', 1, '--graph', '--target', 'onnxruntime', '--input-size', 16]
    image_classification.run(parse_args([str(option) for option in options]), Workers())
    return out


@pytest.mark.parametrize('options', [[], ['--num-epochs', '1', '--lr', '0.01', '--runtimes', 'onnxruntime', 'mxnet']])
def test_a_run_is_deployed_and_verified(run, options, tmp_path, capsys):
    assert deploy.run(deploy.parse_args(['--run', str(run), '--save-dir', str(tmp_path), *options])) == 0
    results = json.loads((tmp_path / 'deploy.json').read_text())
    assert results['verify']['passed'] and results['target'] == 'onnxruntime' and results['images'] == 10
    assert len(results['history']) == bool(options)
    assert results['accuracy']['integer, 10 images'] == results['accuracy']['onnxruntime, 10 images']
    x = np.random.RandomState(0).randn(2, 3, 16, 16).astype(np.float32)
    packed = gq.load_packed(tmp_path / 'net.gqp')(nd.array(x)).asnumpy()
    assert np.array_equal(packed, gq.load(tmp_path / 'final.params')(nd.array(x)).asnumpy())
    assert 'onnxruntime' in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        deploy.parse_args(['--run', str(tmp_path)])
    assert 'there is no results.json in it' in capsys.readouterr().err
