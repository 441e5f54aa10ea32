"""Running tests in a tier of operators."""
from contextlib import contextmanager

import pytest

from gluonquant import ops


@contextmanager
def running(tier):
    """In here ``tier`` is in use; the test is skipped where it cannot run."""
    try:
        previous = ops.use(tier)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    try:
        yield tier
    finally:
        ops.use(previous)
