"""The cosine loss against the torch twin, refused precisions, weights in bfloat16."""
import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
torch = pytest.importorskip("torch")

from granvit.config import resolve_models  # noqa: E402
from granvit.init import initial_values  # noqa: E402
from granvit.models import parameter_shapes  # noqa: E402
from ms_granvit.arrays import to_numpy, to_tensor  # noqa: E402
from ms_granvit.engine import Engine  # noqa: E402
from ms_granvit.introspect import Introspector  # noqa: E402
from parity.fixture import random_batch  # noqa: E402
from tests.helpers import run_config  # noqa: E402


def test_cosine_on_final_features_with_small_crops_equals_the_torch_twin():
    """In PyNative mode; tests/parity/test_check.py compares a static graph with the cosine."""
    from pt_granvit.introspect import Introspector as TorchIntrospector

    config = run_config(distill={"loss": "cosine", "features": "final", "crop_size": 16, "weight": 3.0})
    vision, language = resolve_models(config)
    start = initial_values(parameter_shapes(vision, language), 0)
    batch = random_batch(vision, language, 2, 2, 48, 12, 0, 16)
    ours, theirs = (kind(config, vision, language, start.items(), {}, graph=False).capture(batch)
                    for kind in (Introspector, TorchIntrospector))  # fmt: skip
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    for name, gradient in theirs.parameter_gradients.items():
        of_scale = name.replace("k_proj.bias", "q_proj.bias")  # the true gradient of a key bias is 0
        scale = np.linalg.norm(theirs.parameter_gradients[of_scale])
        assert np.linalg.norm(ours.parameter_gradients[name] - gradient) <= 2e-5 * scale, name


def engine_of(**sections) -> Engine:
    config = run_config(**sections)
    return Engine(config, *resolve_models(config), [])


def test_precisions_that_a_cpu_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"runtime\.compute bfloat16"):
        engine_of(runtime={"compute": "bfloat16", "device": "cpu"})
    with pytest.raises(ValueError, match=r"runtime\.device npu"):
        engine_of(runtime={"device": "npu"})


def test_frozen_weights_in_bfloat16_come_back_bit_for_bit():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(ml_dtypes.bfloat16)
    parameter = ms.Parameter(to_tensor(values, ms.bfloat16))
    assert parameter.dtype == ms.bfloat16
    np.testing.assert_array_equal(to_numpy(parameter).view(np.uint16), values.view(np.uint16))
