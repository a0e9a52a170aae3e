"""The harness, built once for each dtype in a test session."""
import pytest

from .harness import Harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """`harness(dtype, *flags)`: a `Harness`, built at the first use."""
    folder, built = tmp_path_factory.mktemp("ascendc"), {}

    def get(dtype, *flags):
        if (dtype, flags) not in built:
            built[dtype, flags] = Harness(folder, dtype, *flags)
        return built[dtype, flags]

    return get
