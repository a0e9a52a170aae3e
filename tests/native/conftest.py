"""The kernels, compiled in place if they are not there yet."""
import pytest

from granvit import native


@pytest.fixture(scope="session")
def kernels():
    if native.library() is None:
        try:
            native.build(native.HERE)
        except native.BuildError as error:
            pytest.skip(f"no kernels: {error}")
        native.opened.cache_clear()
    assert native.why_missing() is None
