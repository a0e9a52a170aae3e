"""Tiling in both packages: pixel shuffle, ROIAlign over tiles and places of tokens against slow constructions; the twins against
each other on images of unlike tilings; and whole runs of both stages."""
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from granvit.checkpoint.layouts.llava import LLAVA
from granvit.checkpoint.pretrained import start_weights
from granvit.config import Bucket, RunConfig, resolve_models
from granvit.data.batch import Batch, Packer, PromptBatch, Question, join, prompt_batch
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.images import decode, to_views
from granvit.data.records import ImageRecord
from granvit.data.store_writer import write_store
from granvit.introspection import activation_shapes
from granvit.models import parameter_shapes
from parity.fixture import start_values
from tests.conftest import encoded_image, random_record
from tests.helpers import run_config, separate_rows
from tests.test_roi_align import BOXES, slow_roi_align
from tests.test_runs import environment, metrics
from tests.test_twins import BIG, assert_same_gradients, gradients, make_engine

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("torch", "mindspore")
TILES = {"vision": {"tiling": 4}}
GRID = 3  # side of ROIAlign's output


def torch_value_and_gradient(function, x: np.ndarray, cotangent: np.ndarray, *constants: np.ndarray):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(x).requires_grad_()
    y = function(x, *map(torch.from_numpy, constants))
    y.backward(torch.from_numpy(cotangent))
    return y.detach().numpy(), x.grad.numpy()


def mindspore_value_and_gradient(function, x: np.ndarray, cotangent: np.ndarray, *constants: np.ndarray):
    ms = pytest.importorskip("mindspore")

    def weighted(x, cotangent, *constants):
        y = function(x, *constants)
        return (y * cotangent).sum(), y

    run = ms.jit(ms.value_and_grad(weighted, 0, has_aux=True))
    (_, y), gradient = run(ms.Tensor(x), ms.Tensor(cotangent), *map(ms.Tensor, constants))
    return y.asnumpy(), gradient.asnumpy()


def operators(framework: str):
    """pixel_shuffle and roi_align_tiled of one package, and its way to a gradient."""
    pytest.importorskip(framework)
    if framework == "torch":
        from pt_granvit.ops.roi_align import roi_align_tiled
        from pt_granvit.projector import pixel_shuffle
    else:
        from ms_granvit.distributed import join
        from ms_granvit.ops.roi_align import roi_align_tiled
        from ms_granvit.projector import pixel_shuffle

        join("cpu")  # an engine may not choose the device after the first kernel has run
    by_framework = {"torch": torch_value_and_gradient, "mindspore": mindspore_value_and_gradient}
    return pixel_shuffle, roi_align_tiled, by_framework[framework]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pixel_shuffle_puts_four_neighbours_side_by_side(framework):
    pixel_shuffle, _, differentiate = operators(framework)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 36, 3)).astype(np.float32)
    cotangent = rng.standard_normal((2, 9, 12)).astype(np.float32)
    values, gradient = differentiate(pixel_shuffle, features, cotangent)
    for i in range(3):
        for j in range(3):
            patches = [6 * (2 * i + down) + 2 * j + right for down in (0, 1) for right in (0, 1)]
            np.testing.assert_array_equal(values[:, 3 * i + j], features[:, patches].reshape(2, 12))
            np.testing.assert_array_equal(gradient[:, patches].reshape(2, 12), cotangent[:, 3 * i + j])


def test_pixel_shuffle_is_internvls():
    torch = pytest.importorskip("torch")
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    from pt_granvit.projector import pixel_shuffle

    features = torch.randn(2, 36, 3)
    theirs = internvl.InternVLModel.pixel_shuffle(None, features.reshape(2, 6, 6, 3), scale_factor=0.5)
    torch.testing.assert_close(pixel_shuffle(features), theirs.reshape(2, 9, 12), rtol=0, atol=0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_roi_align_over_tiles_equals_roi_align_of_the_map_put_together(framework):
    """Against the slow gather over the tiles put together into one map, values and gradients; places of tiles
    that an image does not have hold large values, which must have no effect."""
    _, roi_align_tiled, differentiate = operators(framework)
    rng = np.random.default_rng(0)
    B, T, H, C, K = 3, 4, 2, 3, len(BOXES)
    tiles = 10 * rng.standard_normal((B, T, H, H, C)).astype(np.float32)
    grids = np.array([[2, 2], [1, 3], [1, 1]], np.int32)
    boxes = np.tile(np.array(list(BOXES.values()), np.float32), (B, 1, 1))
    cotangent = rng.standard_normal((B, K, GRID, GRID, C)).astype(np.float32)

    def on_a_grid(x, grids, boxes):
        return roi_align_tiled(x, grids, boxes, GRID)

    values, gradient = differentiate(on_a_grid, tiles, cotangent, grids, boxes)
    for b, (rows, columns) in enumerate(grids.tolist()):
        whole = np.zeros((rows * H, columns * H, C))
        adjoint = np.zeros_like(whole)
        places = [(t, slice(H * (t // columns), H * (t // columns) + H), slice(H * (t % columns), H * (t % columns) + H))
                  for t in range(rows * columns)]  # fmt: skip
        for t, down, across in places:
            whole[down, across] = tiles[b, t]
        for k, box in enumerate(boxes[b].astype(np.float64)):
            np.testing.assert_allclose(values[b, k], slow_roi_align(whole, box, GRID), rtol=0, atol=1e-4, err_msg=f"{b} {box}")
            for cell in np.ndindex(rows * H, columns * H):
                basis = np.zeros((*whole.shape[:2], 1))
                basis[cell] = 1
                adjoint[cell] += (slow_roi_align(basis, box, GRID) * cotangent[b, k]).sum((0, 1))
        for t, down, across in places:
            np.testing.assert_allclose(gradient[b, t], adjoint[down, across], rtol=0, atol=2e-5)
        assert not gradient[b, rows * columns :].any()


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_tokenizer("qwen2.5"), "qwen2.5")


def picture_of(width: int, height: int, name: str, seed: int) -> ImageRecord:
    """A record of this size with three regions of unlike captions."""
    record = random_record(name, 3, seed)
    return replace(record, width=width, height=height, image=encoded_image(width, height, seed))


RECORDS = (picture_of(70, 60, "2x2", 1), picture_of(90, 30, "1x3", 2), picture_of(30, 90, "3x1", 3))


@pytest.fixture(scope="module")
def batch(chat) -> Batch:
    """Images of 4, 3 and 3 tiles in three unlike grids, two region questions and the global one about each."""
    vision, _ = resolve_models(run_config(**TILES))
    packer = Packer(vision, chat, 3, vision.image_size, 1.0, 10**6)
    asked = [Question("bbox2caption", 2), Question("bbox2caption", 0), Question("global")]
    return join([packer.row(record, asked, Bucket(length=640, answers=72)) for record in RECORDS])


@pytest.fixture(scope="module", params=FRAMEWORKS)
def engine(request):
    return make_engine(request.param, optimizer={"clip_norm": BIG}, **TILES)


def test_the_batch_is_what_it_is_meant_to_be(batch):
    assert batch.grids_B2.tolist() == [[2, 2], [1, 3], [3, 1]] and batch.skipped == ()
    assert (batch.image_positions_BN >= 0).sum(1).tolist() == [20, 16, 16] and batch.questions == 9 and batch.boxes == 6


def test_parameters_are_those_stated_and_the_projector_alone_is_wider(engine):
    shapes = {name: value.shape for name, value in engine.tensors("model")}
    assert shapes == parameter_shapes(*resolve_models(engine.config))
    plain = parameter_shapes(*resolve_models(run_config()))
    changed = {"projector.linear_1.weight": (16, 64)}
    assert {name: shape for name, shape in shapes.items() if plain[name] != shape} == changed


def test_image_tokens_are_those_of_their_place_in_the_whole_image(batch):
    """One view at a time through the encoder, four patches at a time through the projector, the row filled cell by cell."""
    torch = pytest.importorskip("torch")
    engine = make_engine("torch", **TILES)
    model, put = engine.model, torch.from_numpy
    with torch.no_grad():
        ids = put(batch.token_ids_BS).long()
        inputs, _ = model.inputs(put(batch.pixels_B3RR), put(batch.image_weights_B), ids, put(batch.image_positions_BN).long())
        expected = model.language.embed(ids).clone()
        for row, (rows, columns) in enumerate(batch.grids_B2.tolist()):
            first = int(batch.image_positions_BN[row, 0])
            for view in range(1 + rows * columns):
                features = model.vision.encode(put(batch.pixels_B3RR[row, view : view + 1]))[0].reshape(4, 4, -1)
                down, across = divmod(view - 1, columns)
                for i, j in np.ndindex(2, 2):
                    four = features[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(1, -1)
                    hidden = torch.nn.functional.gelu(four @ model.projector.linear_1.weight.T + model.projector.linear_1.bias)
                    token = (hidden @ model.projector.linear_2.weight.T + model.projector.linear_2.bias)[0]
                    place = 2 * i + j if view == 0 else 4 + (2 * down + i) * 2 * columns + 2 * across + j
                    expected[row, first + place] = token
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-5)


def test_packing_is_exact_with_tiles(engine, batch):
    packed, packed_gradients = gradients(engine, [batch])
    apart = separate_rows(batch)
    separate, separate_gradients = gradients(engine, [thirds(apart, first) for first in (0, 3, 6)])
    assert packed.loss_caption == pytest.approx(separate.loss_caption, rel=1e-5)
    assert packed.loss_distill == pytest.approx(separate.loss_distill, rel=1e-5) and packed.loss_distill > 0
    assert_same_gradients(packed_gradients, separate_gradients, 2e-5)
    assert engine.compilations.get("micro_batch", 1) == 1, "grids change, the graph does not"


def thirds(batch: Batch, first: int) -> Batch:
    arrays = {k: v[first : first + 3] for k, v in vars(batch).items() if isinstance(v, np.ndarray)}
    return replace(batch, **arrays, record_ids=batch.record_ids[first : first + 3])


def test_an_absent_tile_has_no_part_and_a_present_one_has(engine, batch):
    whole, whole_gradients = gradients(engine, [batch])
    for view, same in ((4, True), (3, False)):
        pixels = batch.pixels_B3RR.copy()
        pixels[1, view] = 255 - pixels[1, view]
        other, other_gradients = gradients(engine, [replace(batch, pixels_B3RR=pixels)])
        assert (other.loss_caption == whole.loss_caption) == (other.loss_distill == whole.loss_distill) == same
        if same:
            for name, gradient in whole_gradients.items():
                np.testing.assert_allclose(other_gradients[name], gradient, rtol=0, atol=1e-7, err_msg=name)


def test_the_twins_capture_the_same_activations_losses_and_gradients(batch):
    """Every named activation in its stated shape, every parameter's gradient, frozen or not. MindSpore runs in PyNative mode, so
    nothing is compiled; its static graph is compared in tests/parity/test_check.py."""
    captures = []
    config = run_config(**TILES, distill={"grid": 2})
    vision, language = resolve_models(config)
    shapes = activation_shapes(vision, language, 3, batch.token_ids_BS.shape[1], 72, 3, vision.image_size)
    for framework in FRAMEWORKS:
        pytest.importorskip(framework)
        if framework == "torch":
            from pt_granvit.introspect import Introspector
        else:
            from ms_granvit.introspect import Introspector
        start = start_values(vision, language, 0)
        captures.append(Introspector(config, vision, language, start.items(), shapes, graph=False).capture(batch))
    ours, theirs = captures
    for name, loss in ours.losses.items():
        assert loss == pytest.approx(theirs.losses[name], rel=1e-5), name
    assert_same_gradients(theirs.parameter_gradients, ours.parameter_gradients, 5e-5)
    for name, shape in shapes.items():
        assert ours.activations[name].shape == theirs.activations[name].shape == shape
        scale = np.abs(ours.activations[name]).max()
        np.testing.assert_allclose(theirs.activations[name], ours.activations[name], rtol=0, atol=2e-5 * scale, err_msg=name)


def prompts_about(records, chat: Chat) -> PromptBatch:
    vision, _ = resolve_models(run_config(**TILES))
    pixels = np.stack([to_views(decode(record.image, 10**6), vision) for record in records])
    questions = ["What is it?", "And where is that?", "Why?"][: len(records)]
    return prompt_batch(pixels, questions, chat, vision, 150, [(record.width, record.height) for record in records])


def test_generation_agrees_in_both_and_does_not_depend_on_the_neighbours(chat):
    answers = []
    for framework in FRAMEWORKS:
        engine = make_engine(framework, **TILES)
        together = engine.generate(prompts_about(RECORDS, chat), 6, stop_token=-1)
        prompts = prompts_about(RECORDS, chat)
        arrays = {name: array[[1, 1, 1]] for name, array in vars(prompts).items()}
        np.testing.assert_array_equal(engine.generate(PromptBatch(**arrays), 6, stop_token=-1)[0], together[1])
        answers.append(together)
    np.testing.assert_array_equal(*answers)


def run_script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def run_tiled(framework: str, stage: str, folder: Path, scored: bool = False, init_from: Path | None = None) -> RunConfig:
    """Two steps of a stage on a store in `folder`, two rows each whose images have unlike grids; one bucket, one graph."""
    write_store(RECORDS, folder / "store")
    config = run_config(
        stage=stage,
        output=str(folder / stage),
        model={"init_from": None if init_from is None else str(init_from)},
        data={"sources": [{"path": str(folder / "store")}], "buckets": [{"length": 640, "answers": 120}]},
        train={"global_batch": 2, "micro_batch": 2, "steps": 2, "log_every": 1},
        eval={"source": str(folder / "store") if scored else None, "images": 3, "batch": 2, "max_new_tokens": 4},
        **TILES,
    )
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    said = run_script(f"{stage}.py", "--framework", framework, "--config", str(folder / f"{stage}.yaml"))
    assert "is complete" in said and ("held-out caption2bbox" in said) == ("held-out loss" in said) == scored, said
    assert framework == "torch" or "'micro_batch': 1," in said, said
    return config


@pytest.fixture(scope="module")
def tiled_stage_1(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("tiled")
    run_tiled("torch", "stage1", folder)
    return folder / "stage1"


@pytest.fixture(scope="module")
def tiled_stage_2(tmp_path_factory, tiled_stage_1):
    """`tiled_stage_2(framework)`: a run of stage 2 that starts from PyTorch's stage 1, and its configuration; made once.
    PyTorch's is scored; MindSpore's generation is compiled once, for the answer about a picture, so its run is not scored."""

    @cache
    def make(framework: str) -> tuple[Path, RunConfig]:
        folder = tmp_path_factory.mktemp(framework)
        return folder / "stage2", run_tiled(framework, "stage2", folder, scored=framework == "torch", init_from=tiled_stage_1)

    return make


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_both_stages_train_evaluate_and_answer(framework, tmp_path, tiled_stage_1, tiled_stage_2):
    """Stage 2 is asked about a picture that no run has seen."""
    pytest.importorskip(framework)
    run, config = tiled_stage_2(framework)
    (tmp_path / "picture.png").write_bytes(encoded_image(77, 33))
    said = run_script("predict.py", "--framework", framework, "--run", str(run), "--text", "a cup", str(tmp_path / "picture.png"))
    assert "Traceback" not in said
    plain = run_config(model={"init_from": str(tiled_stage_1)})
    with pytest.raises(ValueError, match=r"another architecture.*projector\.linear_1\.weight"):
        start_weights(plain, *resolve_models(plain))
    with pytest.raises(ValueError, match=r"vision\.tiling"):
        LLAVA.write_config(*resolve_models(config))


def test_stage_2_trains_projector_and_decoder_alike_in_both(tiled_stage_2):
    pytest.importorskip("mindspore")
    curves = []
    for framework in FRAMEWORKS:
        run, _ = tiled_stage_2(framework)
        curves.append([line for line in metrics(run) if "loss" in line])
        parts = json.loads((run / "checkpoints" / "step_0000002" / "state.json").read_text())["parts"]
        assert {part for part, entry in parts.items() if entry["hash"] != entry["start"]} == {"projector", "language"}
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
