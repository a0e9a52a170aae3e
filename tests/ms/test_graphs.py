"""Static graphs: how often they are compiled, that recomputation changes no value, cosine loss, refused precisions."""
from dataclasses import replace

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
torch = pytest.importorskip("torch")

from granvit.config import resolve_models  # noqa: E402
from granvit.engine import StepInputs  # noqa: E402
from granvit.init import initial_values  # noqa: E402
from granvit.models import parameter_shapes  # noqa: E402
from ms_granvit.arrays import to_numpy, to_tensor  # noqa: E402
from ms_granvit.engine import Engine  # noqa: E402
from parity.fixture import random_batch  # noqa: E402
from tests.helpers import run_config  # noqa: E402
from tests.ms.ir import operators  # noqa: E402

BUCKETS = ((48, 12), (64, 16))


def make_engine(kind=Engine, **sections):
    config = run_config(optimizer={"clip_norm": 1e9}, **sections)
    vision, language = resolve_models(config)
    return kind(config, vision, language, initial_values(parameter_shapes(vision, language), 0).items())


def restarted(engine: Engine) -> Engine:
    """Resets an engine to its start weights and to moments of zero."""
    start = initial_values(parameter_shapes(*resolve_models(engine.config)), 0)
    engine.load("model", start.items())
    engine.load("teacher", [(n.replace("vision", "teacher", 1), v) for n, v in start.items() if n.startswith("vision.")])
    for group in ("first_moment", "second_moment"):
        engine.load(group, [(n, np.zeros_like(v)) for n, v in engine.tensors(group)])
    return engine


def batches(engine, length: int, answers: int, seed: int, crop: int | None = None):
    return random_batch(*resolve_models(engine.config), 2, 2, length, answers, seed, crop)


def gradients(engine) -> dict[str, np.ndarray]:
    """The gradients of the engine's only step times 1 - beta1, which are its first moment."""
    return dict(engine.tensors("first_moment"))


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_one_compilation_per_bucket_whatever_else_changes(engine):
    for step in range(1, 7):
        length, answers = BUCKETS[step % 2]
        batch = batches(engine, length, answers, seed=step)
        if step > 3:  # no valid box and no supervised token: the same graph, by weights of 0
            batch = replace(batch, box_weights_BK=0 * batch.box_weights_BK, answer_weights_BA=0 * batch.answer_weights_BA)
        micro_batches = [batch] * (1 + step % 3)
        n = len(micro_batches)
        result = engine.step(micro_batches, StepInputs(step, 1e-3 * step, 0.9 - 0.1 * step, n * batch.tokens, n * batch.boxes))
        assert (result.loss == 0) == (step > 3)
    assert engine.compilations == {"micro_batch": len(BUCKETS), "reduce": 1, "update": 1, "ema": 1}


def test_recomputation_runs_every_block_again_and_changes_no_value(engine):
    """One attention, so one softmax, in each block; the teacher's blocks have no backward pass."""
    vision, language = resolve_models(engine.config)
    results, found, softmaxes = [], [], []
    for one in (restarted(engine), make_engine(runtime={"recompute": True})):
        batch = batches(one, *BUCKETS[0], seed=0)
        results.append(one.step([batch], StepInputs(1, 1e-3, 0.9, batch.tokens, batch.boxes)))
        found.append(gradients(one))
        softmaxes.append(operators(one.micro_batch.current_phase, "Softmax"))
    assert softmaxes[0] == 2 * vision.built_layers + language.layers  # encoder, teacher, decoder
    assert softmaxes[1] - softmaxes[0] == vision.built_layers + language.layers
    assert results[0] == results[1]
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name], err_msg=name)


def test_cosine_on_final_features_with_small_crops_equals_the_torch_twin():
    from pt_granvit.engine import Engine as TorchEngine

    sections = {"distill": {"loss": "cosine", "features": "final", "crop_size": 16, "weight": 3.0}}
    results, found = [], []
    for kind in (Engine, TorchEngine):
        one = make_engine(kind, **sections)
        batch = batches(one, *BUCKETS[0], seed=0, crop=16)
        results.append(one.step([batch], StepInputs(1, 1e-3, 0.9, batch.tokens, batch.boxes)))
        found.append(gradients(one))
    assert results[0].loss_distill == pytest.approx(results[1].loss_distill, rel=1e-5)
    assert results[0].feature_std == pytest.approx(results[1].feature_std, rel=1e-5)
    for name, gradient in found[1].items():
        scale = np.linalg.norm(found[1][name.replace("k_proj.bias", "q_proj.bias")])  # the true gradient of a key bias is 0
        assert np.linalg.norm(found[0][name] - gradient) <= 2e-5 * scale, name


def test_precisions_that_a_cpu_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"runtime\.compute bfloat16"):
        make_engine(runtime={"compute": "bfloat16", "device": "cpu"})
    with pytest.raises(ValueError, match=r"runtime\.device npu"):
        make_engine(runtime={"device": "npu"})


def test_frozen_weights_in_bfloat16_come_back_bit_for_bit():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(ml_dtypes.bfloat16)
    parameter = ms.Parameter(to_tensor(values, ms.bfloat16))
    assert parameter.dtype == ms.bfloat16
    np.testing.assert_array_equal(to_numpy(parameter).view(np.uint16), values.view(np.uint16))
