"""The Python blocks of the README run as they stand, in order of appearance."""
import re
import shutil
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from gluoncv.model_zoo import get_model

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf8')
BLOCKS = re.findall(r'```python\n(.*?)```', README, flags=re.S)


def float_net(path=None):
    net = get_model('cifar_resnet20_v1', classes=10)
    net.initialize(mx.init.Xavier())
    net(mx.nd.zeros((1, 3, 32, 32)))
    if path:
        net.save_parameters(path)
    return net


def detector(path):
    net = get_model('ssd_300_mobilenet0.25_custom', classes=['cat', 'dog'], pretrained_base=False)
    net.initialize()
    net(mx.nd.zeros((1, 3, 128, 128)))
    for name, parameter in net.collect_params('.*(gamma|var|beta|mean)$').items():
        parameter.set_data(mx.nd.ones_like(parameter.data()) * name.endswith(('gamma', 'var')))
    net.save_parameters(path)


@pytest.fixture(scope='module')
def names(tmp_path_factory):
    """Names that the blocks share, as a reader's session would, and the files they need."""
    folder = tmp_path_factory.mktemp('readme')
    float_net(str(folder / 'float.params'))
    detector(str(folder / 'ssd.params'))
    random = np.random.RandomState(0)
    batch = (mx.nd.array(random.randn(4, 3, 32, 32)), mx.nd.array([0, 1, 2, 3]))
    return {'loader': [batch, batch]}, folder


@pytest.mark.parametrize('block', BLOCKS, ids=[f'block{i}' for i in range(len(BLOCKS))])
def test_blocks_run(block, names, monkeypatch, capsys):
    shared, folder = names
    monkeypatch.chdir(folder)
    if block.startswith('gq.convert'):
        shared['net'] = float_net()
    if shutil.which('dot') is None:         # Graphviz is a program of its own; without it the text is written
        block = block.replace("'quantized.svg'", "'quantized.dot'")
    exec(block, shared)
    assert shared['net'] is not None


def test_readme_names_every_method():
    from gluonquant import quantizers
    for name in quantizers.available():
        assert f'| `{name}`' in README, name
