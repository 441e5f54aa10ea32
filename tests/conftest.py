"""Puts tests/ on the path (for ``reference``, ``strategies``) and gives every test its seed."""
import os
import random
import sys
import zlib
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from hypothesis import settings

# Continuous integration judges a change, not its luck; elsewhere every run tries new examples.
settings.register_profile('steady', derandomize=True, deadline=None)
if os.environ.get('CI'):
    settings.load_profile('steady')

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption('--seed', type=int, default=None, help='run every test with this seed instead of its own')


@pytest.fixture
def seed(request):
    """A seed of the test's own, the same in every run; also seeds the global generators. Printed on failure."""
    value = request.config.getoption('--seed')
    if value is None:
        value = zlib.crc32(request.node.nodeid.rpartition('/')[2].encode()) % 10 ** 6
    print(f'seed: repeat with --seed={value}')
    random.seed(value)
    np.random.seed(value)
    mx.random.seed(value)
    return value


@pytest.fixture
def rng(seed):
    """NumPy's generator with the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def shared():
    """The folder with data and weights that the repository does not carry."""
    folder = os.environ.get('GLUONQUANT_SHARED')
    if not folder or not Path(folder).is_dir():
        pytest.skip('needs the folder of data and weights: set GLUONQUANT_SHARED')
    return Path(folder)
