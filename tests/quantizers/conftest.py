"""Every test of a quantizer runs in every tier of operators that this machine can run."""
import pytest

from gluonquant import ops
from tiers import running


@pytest.fixture(autouse=True, params=ops.TIERS)
def tier(request):
    """The tier in use."""
    with running(request.param) as name:
        yield name
