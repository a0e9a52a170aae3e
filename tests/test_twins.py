"""Properties of each framework's engine, tested through `TrainEngine` only, and agreement of the two.

One engine of each framework is built and compiled once (`engine`); `reset` restores its start weights.
"""
from dataclasses import replace

import numpy as np
import pytest

from granvit.config import resolve_models
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import NonFiniteLoss, StepInputs
from granvit.models import language_shapes, parameter_shapes, part_of, projector_shapes, vision_shapes
from parity.fixture import PREFIX_AFTER, PREFIX_BEFORE, random_batch, start_values
from tests.helpers import run_config, separate_rows

LENGTH, ANSWERS, ROWS, REGIONS = 72, 20, 2, 6
BIG = 1e9  # a clip norm that never clips: the first moment after one step is then 0.1 times the gradient


def make_engine(framework: str, **sections):
    """An engine on the tiny models with random weights of seed 0."""
    pytest.importorskip({"torch": "torch", "mindspore": "mindspore"}[framework])
    if framework == "torch":
        from pt_granvit.engine import Engine
    else:
        from ms_granvit.engine import Engine
    sections = {"data": {"regions_per_row": REGIONS}, "train": {"global_batch": ROWS}, **sections}
    config = run_config(**sections)
    vision, language = resolve_models(config)
    return Engine(config, vision, language, start_values(vision, language, seed=0).items())


def reset(engine) -> None:
    start = start_values(*resolve_models(engine.config), seed=0)
    engine.load("model", start.items())
    teacher = [("teacher" + n.removeprefix("vision"), v) for n, v in start.items() if part_of(n) == "vision"]
    engine.load("teacher", teacher)
    for group in ("first_moment", "second_moment"):
        engine.load(group, [(n, np.zeros_like(v)) for n, v in engine.tensors(group)])


def step_inputs(step: int, *batches: Batch, lr: float = 1e-2) -> StepInputs:
    return StepInputs(step, lr, 0.9, sum(b.tokens for b in batches), sum(b.boxes for b in batches))


def gradients(engine, batches: list[Batch]) -> tuple[object, dict[str, np.ndarray]]:
    """Result and gradients of the given micro-batches from the start weights (needs clip_norm BIG)."""
    reset(engine)
    result = engine.step(batches, step_inputs(1, *batches))
    return result, {n: m / np.float32(0.1) for n, m in engine.tensors("first_moment")}


def assert_same_gradients(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    """Each tensor within `tolerance` of its own norm. The exact gradient of a key bias is 0 (softmax
    ignores a shift), so its rounding error is compared with the norm of the query bias."""
    assert a.keys() == b.keys()
    for name in a:
        scale = np.linalg.norm(b[name.replace("k_proj.bias", "q_proj.bias")])
        assert np.linalg.norm(a[name] - b[name]) <= tolerance * scale, name


@pytest.fixture(scope="module", params=["torch", "mindspore"])
def engine(request):
    return make_engine(request.param, optimizer={"clip_norm": BIG})


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(*resolve_models(run_config()), ROWS, REGIONS, LENGTH, ANSWERS, seed=0)


def slices(batch: Batch, rows: int) -> list[Batch]:
    """A batch cut into micro-batches of `rows` rows."""
    cut = []
    for first in range(0, len(batch.record_ids), rows):
        arrays = {k: v[first : first + rows] for k, v in vars(batch).items() if isinstance(v, np.ndarray)}
        cut.append(replace(batch, **arrays, record_ids=batch.record_ids[first : first + rows]))
    return cut


def test_parameters_have_the_canonical_names_shapes_and_order(engine):
    shapes = {name: value.shape for name, value in engine.tensors("model")}
    assert shapes == parameter_shapes(*resolve_models(engine.config))


def test_packing_is_exact(engine, batch):
    packed, packed_gradients = gradients(engine, [batch])
    separate, separate_gradients = gradients(engine, slices(separate_rows(batch), ROWS))
    assert packed.loss_caption == pytest.approx(separate.loss_caption, rel=1e-5)
    assert packed.loss_distill == pytest.approx(separate.loss_distill, rel=1e-5)
    assert_same_gradients(packed_gradients, separate_gradients, 1e-5)


def test_packing_check_sees_a_plain_causal_mask(engine, batch):
    packed, _ = gradients(engine, [batch])
    leaking, _ = gradients(engine, [replace(batch, segments_BS=np.minimum(batch.segments_BS, 0))])
    assert abs(packed.loss_caption - leaking.loss_caption) > 1e-3 * packed.loss_caption


def test_accumulation_equals_one_batch(engine, batch):
    other = random_batch(*resolve_models(engine.config), ROWS, REGIONS, LENGTH, ANSWERS, seed=5)
    other.answer_weights_BA[:, 3:] = 0  # other counts, so that a mean of means would differ
    halves = []
    for one in (batch, other):
        for keep in np.eye(2, dtype=np.float32)[:, :, None]:  # the first row alone, the second row alone
            halves.append(replace(one, answer_weights_BA=one.answer_weights_BA * keep, box_weights_BK=one.box_weights_BK * keep))
    whole, whole_gradients = gradients(engine, [batch, other])
    split, split_gradients = gradients(engine, halves)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    assert_same_gradients(split_gradients, whole_gradients, 2e-5)


def test_each_reduction_is_what_it_says(engine, batch):
    """Two micro-batches, one of them with few tokens and no box, against the sums of each by itself."""
    compiled = dict(engine.compilations)
    few = replace(batch, box_weights_BK=0 * batch.box_weights_BK, answer_weights_BA=batch.answer_weights_BA.copy())
    few.answer_weights_BA[:, 2:] = 0
    none = replace(batch, box_weights_BK=0 * batch.box_weights_BK, answer_weights_BA=0 * batch.answer_weights_BA)
    results, found = {}, {}
    for name, one in (("batch", batch), ("few", few)):
        results[name], found[name] = gradients(engine, [one])  # means over one micro-batch's own tokens and boxes
    caption = {name: result.loss_caption for name, result in results.items()}
    assert abs(caption["few"] - caption["batch"]) > 0.01 and batch.tokens > 3 * few.tokens

    together, _ = gradients(engine, [batch, few])
    summed = sum(caption[name] * one.tokens for name, one in (("batch", batch), ("few", few)))
    assert together.loss_caption == pytest.approx(summed / (batch.tokens + few.tokens), rel=1e-5)
    assert together.loss_distill == pytest.approx(results["batch"].loss_distill, rel=1e-5)

    def per_device(batches, members):
        reset(engine)
        result = engine.step(batches, replace(step_inputs(1, batch, few), averaged_micro_batches=members))
        return result, {n: m / np.float32(0.1) for n, m in engine.tensors("first_moment")}

    meant, of_means = per_device([batch, few], 2)
    assert meant.loss_caption == pytest.approx((caption["batch"] + caption["few"]) / 2, rel=1e-5)
    assert meant.loss_distill == pytest.approx(results["batch"].loss_distill / 2, rel=1e-5)
    assert meant.feature_std == together.feature_std == results["batch"].feature_std
    assert_same_gradients(of_means, {n: (found["batch"][n] + found["few"][n]) / 2 for n in of_means}, 2e-5)
    empty, _ = per_device([batch, none], 2)
    assert empty.loss == pytest.approx(results["batch"].loss / 2, rel=1e-5)
    ranks = [per_device([one], 2) for one in (batch, few)]  # what two ranks of one micro-batch sum
    assert sum(result.loss for result, _ in ranks) == pytest.approx(meant.loss, rel=1e-5)
    assert_same_gradients({n: ranks[0][1][n] + ranks[1][1][n] for n in of_means}, of_means, 2e-5)
    if compiled:
        assert {k: engine.compilations[k] for k in compiled} == compiled


def test_held_out_sums_are_the_losses_undivided_and_change_nothing(engine, batch):
    few = replace(batch, box_weights_BK=batch.box_weights_BK.copy(), answer_weights_BA=batch.answer_weights_BA.copy())
    few.answer_weights_BA[:, 2:], few.box_weights_BK[0] = 0, 0
    result, _ = gradients(engine, [batch, few])
    reset(engine)
    groups = ("model", "teacher", "first_moment", "second_moment")
    before = [dict(engine.tensors(group)) for group in groups]
    for batches in ([batch, few], [few, batch]):
        caption, distill = engine.loss_sums(iter(batches)).tolist()
        assert caption == pytest.approx(result.loss_caption * (batch.tokens + few.tokens), rel=1e-5)
        assert distill == pytest.approx(result.loss_distill * (batch.boxes + few.boxes), rel=1e-5)
    for group, tensors in zip(groups, before, strict=True):
        for name, value in engine.tensors(group):
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    again, _ = gradients(engine, [batch, few])
    assert again == result and engine.compilations.get("held_out", 1) == 1


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_a_collapsed_teacher_has_no_spread(framework):
    """`feature_std` is 0 if all cells hold one vector, whatever its channels; another map's spread is compared with numpy."""
    pytest.importorskip(framework)
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(2, 3, 4, 4, 8)).astype(np.float32)
    collapsed = np.broadcast_to(rng.normal(size=(2, 3, 1, 1, 8)), spread.shape).astype(np.float32)
    weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (2, 3, 1))
    if framework == "torch":
        from torch import from_numpy as tensor

        from pt_granvit.distill import distill_sums
    else:
        from mindspore import Tensor as tensor

        from ms_granvit.distill import distill_sums
    for teacher, expected in ((collapsed, 0.0), (spread, (spread.var((2, 3)).mean(-1) * weights).sum())):
        student = tensor(np.zeros((2, 16, 8), np.float32))
        _, variance = distill_sums(student, tensor(teacher), tensor(boxes), tensor(weights), "mse")
        assert float(variance) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_row_without_boxes_contributes_nothing(engine, batch):
    compiled = dict(engine.compilations)
    weights = batch.box_weights_BK.copy()
    weights[1] = 0
    one, _ = gradients(engine, [replace(batch, box_weights_BK=weights)])
    boxes = batch.boxes_BK4.copy()
    boxes[1] = boxes[0]
    same, _ = gradients(engine, [replace(batch, box_weights_BK=weights, boxes_BK4=boxes)])
    none, _ = gradients(engine, [replace(batch, box_weights_BK=np.zeros_like(weights))])
    both, _ = gradients(engine, [batch])
    assert one.loss_distill == same.loss_distill != both.loss_distill
    assert none.loss_distill == 0 and none.loss_caption == both.loss_caption
    if engine.compilations:
        assert {k: engine.compilations[k] for k in compiled} == compiled or not compiled


def test_a_text_row_ignores_its_pixels(engine, batch):
    text = replace(batch, image_weights_B=np.zeros(ROWS, np.float32))
    one, _ = gradients(engine, [text])
    two, _ = gradients(engine, [replace(text, pixels_B3RR=255 - batch.pixels_B3RR)])
    image, _ = gradients(engine, [batch])
    assert one.loss_caption == two.loss_caption != image.loss_caption


def test_ten_steps_move_what_trains_freeze_the_rest_and_carry_the_teacher(engine, batch):
    reset(engine)
    before = dict(engine.tensors("model"))
    teacher = {n: v.astype(np.float64) for n, v in before.items() if part_of(n) == "vision"}
    losses = []
    for step in range(1, 11):
        losses.append(engine.step([batch], step_inputs(step, batch)).loss)
        student = dict(engine.tensors("model"))
        teacher = {n: 0.9 * v + 0.1 * student[n] for n, v in teacher.items()}
    after = dict(engine.tensors("model"))
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (part_of(name) == "language"), name
    for name, value in engine.tensors("teacher"):
        np.testing.assert_allclose(value, teacher["vision" + name.removeprefix("teacher")], rtol=0, atol=2e-6)
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_changes_no_weight(engine, batch):
    reset(engine)
    broken = {n: np.full_like(v, np.nan) if n == "projector.linear_2.bias" else v for n, v in engine.tensors("model")}
    engine.load("model", broken.items())
    with pytest.raises(NonFiniteLoss) as caught:
        engine.step([batch, batch], step_inputs(1, batch, batch))
    assert caught.value.micro_batches == (0, 1)
    for name, value in engine.tensors("model"):
        assert np.array_equal(value, broken[name], equal_nan=True), name
    again, _ = gradients(engine, [batch])
    assert np.isfinite(again.loss), "gradients of the refused step were left behind"


def test_generation_with_a_cache_equals_generation_without(engine, batch):
    reset(engine)
    new, N = 5, resolve_models(engine.config)[0].patches
    prefix = PREFIX_BEFORE + N + PREFIX_AFTER
    lengths = np.array([prefix + 3, prefix + 6], np.int32)
    tokens = batch.token_ids_BS[:, : prefix + 6 + new].copy()
    prompts = PromptBatch(batch.pixels_B3RR, tokens, lengths, batch.image_positions_BN)
    answers = engine.generate(prompts, new, stop_token=-1)
    for t in range(new):
        longer = tokens.copy()
        for row, length in enumerate(lengths):
            longer[row, length : length + t] = answers[row, :t]
        grown = engine.generate(replace(prompts, token_ids_BS=longer, lengths_B=lengths + t), new, stop_token=-1)
        np.testing.assert_array_equal(grown[:, 0], answers[:, t])
    stop = int(answers[0, 1])
    stopped = engine.generate(prompts, new, stop_token=stop)
    first = list(answers[0]).index(stop)
    assert (stopped[0, first:] == stop).all() and (stopped[0, :first] == answers[0, :first]).all()


def test_a_weight_of_zero_takes_out_the_distillation_and_nothing_else(engine, batch):
    """With `distill.weight` 0 a batch with boxes gives what the default weight gives without boxes."""
    framework = "torch" if type(engine).__module__.startswith("pt") else "mindspore"
    unweighted = make_engine(framework, optimizer={"clip_norm": BIG}, distill={"weight": 0.0})
    without_boxes = replace(batch, box_weights_BK=0 * batch.box_weights_BK)
    weighted, with_distillation = gradients(engine, [batch])
    caption, expected = gradients(engine, [without_boxes])
    result = unweighted.step([batch], step_inputs(1, batch))  # it has no teacher, which `reset` would load
    found = {n: m / np.float32(0.1) for n, m in unweighted.tensors("first_moment")}
    assert result.loss == result.loss_caption == pytest.approx(caption.loss, rel=1e-6)
    assert result.loss_distill == 0 < weighted.loss_distill
    assert_same_gradients(found, expected, 1e-5)
    changed = {n for n, g in with_distillation.items() if np.linalg.norm(g - found[n]) > 1e-3 * np.linalg.norm(found[n])}
    assert {part_of(name) for name in changed} == {"vision"}


@pytest.mark.parametrize("engine", ["mindspore"], indirect=True)
def test_one_compilation_whatever_changes_but_the_shapes(engine, batch):
    """Learning rate, alpha, number of micro-batches, and batches without a valid box or a supervised token."""
    reset(engine)
    none = replace(batch, box_weights_BK=0 * batch.box_weights_BK, answer_weights_BA=0 * batch.answer_weights_BA)
    for step in range(1, 7):
        one, n = (none if step > 3 else batch), 1 + step % 3
        result = engine.step([one] * n, StepInputs(step, 1e-3 * step, 0.9 - 0.1 * step, n * one.tokens, n * one.boxes))
        assert (result.loss == 0) == (step > 3)
    graphs = engine.compilations
    assert {name: graphs[name] for name in ("micro_batch", "reduce", "update", "ema")} == dict.fromkeys(
        ("micro_batch", "reduce", "update", "ema"), 1
    )


def step_counting_blocks(recompute: bool, batch: Batch) -> tuple[object, dict[str, np.ndarray], list[int]]:
    """Result and gradients of one step of the torch twin, and how often each block of encoder and decoder ran forward."""
    one = make_engine("torch", optimizer={"clip_norm": BIG}, runtime={"recompute": recompute})
    runs = dict.fromkeys([*one.model.vision.encoder.layers, *one.model.language.model.layers], 0)

    def count(block, _inputs) -> None:
        runs[block] += 1

    for block in runs:
        block.register_forward_pre_hook(count)
    return *gradients(one, [batch]), list(runs.values())


def test_recomputation_in_torch_runs_every_block_again_and_changes_no_value(batch):
    plain, plain_gradients, once = step_counting_blocks(False, batch)
    recomputed, recomputed_gradients, twice = step_counting_blocks(True, batch)
    assert set(once) == {1} and twice == [2] * len(once)
    assert plain == recomputed
    for name, gradient in plain_gradients.items():
        np.testing.assert_array_equal(gradient, recomputed_gradients[name], err_msg=name)


@pytest.mark.parametrize("engine", ["mindspore"], indirect=True)
def test_recomputation_in_mindspore_runs_every_block_again_and_changes_no_value(engine, batch):
    """One attention, so one softmax, in each block; the teacher's blocks have no backward pass."""
    from tests.ms.ir import operators

    vision, language = resolve_models(engine.config)
    composed = {"attention": "composed"}
    one, other = (make_engine("mindspore", optimizer={"clip_norm": BIG}, runtime={"kernels": composed, "recompute": again})
                  for again in (False, True))  # fmt: skip
    plain, plain_gradients = gradients(one, [batch])
    recomputed, recomputed_gradients = gradients(other, [batch])
    once, twice = (operators(made.micro_batch.current_phase, "Softmax") for made in (one, other))
    assert once == 2 * vision.built_layers + language.layers  # encoder, teacher, decoder
    assert twice - once == vision.built_layers + language.layers
    assert plain == recomputed
    for name, gradient in plain_gradients.items():
        np.testing.assert_array_equal(gradient, recomputed_gradients[name], err_msg=name)


def test_the_cross_entropy_from_hidden_states_is_that_from_logits(engine, batch):
    framework = "torch" if type(engine).__module__.startswith("pt") else "mindspore"
    other = make_engine(framework, optimizer={"clip_norm": BIG}, runtime={"kernels": {"cross_entropy": "chunked"}})
    assert other.kernels.names["cross_entropy"] == "chunked"
    (result, gradients_of_logits), (found, chunked_gradients) = gradients(engine, [batch]), gradients(other, [batch])
    np.testing.assert_allclose(list(vars(found).values()), list(vars(result).values()), rtol=1e-5)
    assert_same_gradients(chunked_gradients, gradients_of_logits, 1e-5)


@pytest.mark.parametrize("stage, trained", [("stage2", {"projector", "language"}), ("guesser", {"language"})])
def test_other_stages_train_what_they_say(stage, trained, batch):
    engines = [make_engine(framework, stage=stage) for framework in ("torch", "mindspore")]
    results = [one.step([batch], step_inputs(1, batch)) for one in engines]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    before = start_values(*resolve_models(engines[0].config), seed=0)
    for one in engines:
        moved = {part_of(n) for n, v in one.tensors("model") if not np.array_equal(v, before[n])}
        assert moved == trained


def adamw(step: int, rate: float, decay: float, before: dict, after: dict) -> dict[str, np.ndarray]:
    """One tensor's first and second moment, and its value, after an update; float64, from the formula (algorithm 2 of Loshchilov
    & Hutter 2019). The clipped gradient is what moved the first moment."""
    gradient = (after["first_moment"] - 0.9 * before["first_moment"]) / 0.1
    second = 0.999 * before["second_moment"] + 0.001 * gradient**2
    kept = before["model"] * (1 - rate * (decay if gradient.ndim >= 2 else 0))
    moved = after["first_moment"] / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return {"second_moment": second, "model": kept - rate * moved}


def test_the_twins_follow_one_curve_with_the_rates_of_their_parts(batch):
    """The encoder has three times the learning rate and its own decay; each tensor follows AdamW with its part's settings."""
    parts = {"vision": {"lr": 3e-2, "weight_decay": 0.7}}
    settings = {"optimizer": {"weight_decay": 0.1, "clip_norm": 0.5, "parts": parts}, "distill": {"grid": 2, "crop_size": 32}}
    rates = {"vision": (3e-3, 0.7), "projector": (1e-3, 0.1)}  # the step's learning rate is 1e-3, of an optimizer.lr of 1e-2
    groups, curves = ("model", "first_moment", "second_moment"), []
    for framework in ("torch", "mindspore"):
        one, curve = make_engine(framework, **settings), []
        for step in range(1, 6):
            before = {group: dict(one.tensors(group)) for group in groups}
            curve.append(one.step([batch], step_inputs(step, batch, lr=1e-3)))
            after = {group: dict(one.tensors(group)) for group in groups}
            for name in after["first_moment"]:
                was, found = ({g: tensors[g][name].astype(np.float64) for g in groups} for tensors in (before, after))
                for group, value in adamw(step, *rates[part_of(name)], was, found).items():
                    scale = 1e-3 if group == "model" else np.abs(value).max()  # a weight moves by about its rate
                    np.testing.assert_allclose(found[group], value, rtol=2e-7, atol=1e-3 * scale, err_msg=f"{name} {group}")
        curves.append(curve)
    for a, b in zip(*curves, strict=True):
        for field in ("loss", "loss_caption", "loss_distill", "grad_norm", "feature_std"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-4), field


def test_shapes_of_every_part_are_disjoint():
    vision, language = resolve_models(run_config())
    parts = vision_shapes(vision), projector_shapes(vision, language), language_shapes(language)
    assert len(parameter_shapes(vision, language)) == sum(map(len, parts))
