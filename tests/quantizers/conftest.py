"""Every test of a quantizer runs in every tier of operators that this machine can run."""
import pytest

from gluonquant import ops


@pytest.fixture(autouse=True, params=ops.TIERS)
def tier(request):
    """The tier in use."""
    try:
        previous = ops.use(request.param)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    yield request.param
    ops.use(previous)
