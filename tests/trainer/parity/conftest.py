import pytest

from tests.trainer.parity.recorded import Recording


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Recording:
    """The file that `recorded.each` names."""
    return Recording(request.param)
