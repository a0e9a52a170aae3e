"""Tiling's geometry, rows and prompts, against slow constructions from the definition."""
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from granvit.config import CONFIGS, Bucket, load_config, resolve_models
from granvit.data.batch import Packer, Question, join, prompt_batch
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.heldout import held_out
from granvit.data.images import (
    box_to_canvas,
    decode,
    image_tokens,
    tile_grids,
    to_canvas,
    to_square,
    to_views,
    token_places,
)
from granvit.data.loader import Loader
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from tests.conftest import encoded_image, random_record
from tests.data.test_loader import run
from tests.helpers import run_config

BUCKET = Bucket(length=700, answers=120)


@pytest.fixture(scope="module")
def tiled(vision):
    """Tiles of 32 pixels, 4 x 4 patches or 2 x 2 image tokens each; at most six."""
    return vision.model_copy(update={"tiles": 6})


def record_of(width: int, height: int, name: str = "a") -> ImageRecord:
    region = Region((0.1, 0.2, 0.7, 0.9), "a thing")
    return ImageRecord(name, width, height, encoded_image(width, height), "all of it", (region,))


@pytest.mark.parametrize("tiles", [1, 2, 4, 6, 12])
def test_the_grid_keeps_most_pixels_with_least_waste(tiled, tiles):
    """LLaVA-NeXT's rule in fractions: most effective resolution, then least of the canvas wasted, which leaves one grid."""
    vision = tiled.model_copy(update={"tiles": tiles})
    sizes = np.random.default_rng(tiles).integers(1, 300, (300, 2))
    sizes[:60, 1] = sizes[:60, 0]  # squares tie most
    sizes[60:120] = 32 * (1 + sizes[60:120] // 32)
    for (width, height), found in zip(sizes.tolist(), tile_grids(*sizes.T, vision).tolist(), strict=True):
        scored = []
        for rows in range(1, tiles + 1):
            for columns in range(1, tiles // rows + 1):
                canvas = 32 * 32 * rows * columns
                scale = min(Fraction(32 * columns, width), Fraction(32 * rows, height))
                effective = min(scale**2 * width * height, width * height)
                scored.append((effective, effective - canvas, [rows, columns]))
        best = max(score[:2] for score in scored)
        assert [grid for *score, grid in scored if tuple(score) == best] == [found], (width, height)


def test_a_small_image_is_one_tile_and_a_large_one_all_that_its_aspect_fills(tiled):
    grids = {(5, 9): [1, 1], (32, 32): [1, 1], (33, 32): [1, 2], (64, 32): [1, 2], (999, 999): [2, 2], (999, 9): [1, 6],
             (9, 999): [6, 1], (900, 600): [2, 3]}  # fmt: skip
    assert {size: tile_grids(*size, tiled).tolist() for size in grids} == grids


def test_a_box_has_the_same_place_in_the_fitted_image_on_the_canvas(tiled):
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 400, (200, 2)).tolist():
        box = tuple(np.sort(rng.uniform(0, 1, (2, 2)), 0).ravel().tolist())
        carried = box_to_canvas(box, width, height, tiled)
        assert all(0 <= side <= 1 for side in carried)
        whole = np.array(box_to_canvas((0, 0, 1, 1), width, height, tiled))
        back = (np.array(carried) - np.tile(whole[:2], 2)) / np.tile(whole[2:] - whole[:2], 2)
        np.testing.assert_allclose(back, box, atol=1e-9)


@pytest.mark.parametrize("width, height", [(300, 200), (97, 301), (130, 131), (40, 20)])
def test_a_painted_box_lands_on_the_canvas_where_the_geometry_says(tiled, width, height):
    """Paint the box white on black, fit the picture into the canvas, and measure where the white went."""
    vision = tiled.model_copy(update={"image_size": 128, "mean": (0.0, 0.0, 0.0)})
    x1, y1, x2, y2 = width // 5, height // 4, width - width // 3, height - height // 8
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y1:y2, x1:x2] = 255
    seen = to_canvas(picture, vision)[..., 0] / 255
    box = (x1 / width, y1 / height, x2 / width, y2 / height)
    expected = np.array(box_to_canvas(box, width, height, vision)) * np.tile(seen.shape[::-1], 2)
    columns, rows = seen.max(0), seen.max(1)
    middle_x, middle_y = int(expected[[0, 2]].mean()), int(expected[[1, 3]].mean())
    measured = [middle_x - columns[:middle_x].sum(), middle_y - rows[:middle_y].sum(),
                middle_x + columns[middle_x:].sum(), middle_y + rows[middle_y:].sum()]  # fmt: skip
    np.testing.assert_allclose(measured, expected, atol=0.15)


def test_views_are_the_square_then_the_canvas_cut_row_by_row(tiled):
    vision = tiled.model_copy(update={"mean": (0.5, 0.25, 1.0)})
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    views, canvas = to_views(picture, vision), to_canvas(picture, vision)
    assert views.shape == (7, 3, 32, 32) and views.dtype == np.uint8 and canvas.shape == (64, 96, 3)
    np.testing.assert_array_equal(views[0], to_square(picture, vision))
    for row in range(2):
        for column in range(3):
            cut = canvas[32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
            np.testing.assert_array_equal(views[1 + 3 * row + column], cut.transpose(2, 0, 1))
    assert (canvas[:, :7] == (127, 63, 255)).all()  # 90 x 70 fits as 82 x 64
    small = to_views(picture[:20, :30], vision)
    assert small[1].any() and not small[2:].any()
    np.testing.assert_array_equal(to_views(picture, vision.model_copy(update={"tiles": 0})), to_square(picture, vision))


def test_tokens_stand_where_their_patches_are_in_the_whole_image(tiled):
    for width, height in ((90, 70), (30, 30), (300, 20), (64, 96)):
        rows, columns = tile_grids(width, height, tiled).tolist()
        expected = [[0, 1, 2, 3]]  # the global view
        for tile in range(6):
            down, across = divmod(tile, columns)
            cells = [4 + (2 * down + i) * 2 * columns + 2 * across + j for i in range(2) for j in range(2)]
            expected.append(cells if tile < rows * columns else [-1] * 4)
        places = token_places(width, height, tiled)
        assert places.reshape(7, 4).tolist() == expected
        assert sorted(places[places >= 0]) == list(range(image_tokens(width, height, tiled)))


def test_rows_hold_the_tokens_of_the_tiles_that_their_image_has(tiled, chat):
    packer = Packer(tiled, chat, 1, 32, 1.0, 10**6)
    records = [record_of(90, 70, "wide"), record_of(20, 30, "small"), record_of(500, 500, "square")]
    rows = [packer.row(record, [Question("bbox2caption", 0), Question("global")], BUCKET) for record in records]
    batch = join([*rows, packer.empty(BUCKET), packer.text_row("text", range(8), [("what?", "that")], BUCKET)])
    assert batch.pixels_B3RR.shape == (5, 7, 3, 32, 32) and batch.image_positions_BN.shape == (5, 28)
    assert batch.grids_B2.tolist() == [[2, 3], [1, 1], [2, 2], [1, 1], [1, 1]]
    for row, views in enumerate((7, 2, 5, 2, 2)):
        positions = batch.image_positions_BN[row]
        before = len(chat.prefix_before)
        assert sorted(positions[positions >= 0]) == list(range(before, before + 4 * views))
        assert (batch.segments_BS[row] == 0).sum() == chat.prefix_length(4 * views)
    for row, record in enumerate(records):
        np.testing.assert_array_equal(batch.pixels_B3RR[row], to_views(decode(record.image, 10**6), tiled))
        box = box_to_canvas(record.regions[0].box, record.width, record.height, tiled)
        np.testing.assert_allclose(batch.boxes_BK4[row, 0], box, rtol=1e-6)
    tokens = [(row.segments_BS >= 0).sum() for row in rows]
    assert tokens[0] - tokens[1] == 4 * 5 and tokens[0] - tokens[2] == 4 * 2
    assert [row.questions for row in rows] == [2, 2, 2] and not batch.skipped


def test_prompts_are_as_long_as_their_image_makes_them(tiled, chat):
    sizes, questions = [(90, 70), (20, 30)], ["What is it?", "Where?"]
    prompts = prompt_batch(np.zeros((2, 7, 3, 32, 32), np.uint8), questions, chat, tiled, 400, sizes)
    for row, (views, question) in enumerate(zip((7, 2), questions, strict=True)):
        ids = prompts.token_ids_BS[row, : prompts.lengths_B[row]].tolist()
        assert len(ids) == chat.prefix_length(4 * views) + len(chat.question_ids(question))
        assert ids[-len(chat.question_ids(question)) :] == chat.question_ids(question)
        positions = prompts.image_positions_BN[row]
        assert (positions >= 0).sum() == 4 * views
        assert (prompts.token_ids_BS[row, positions[positions >= 0]] == chat.pad_token).all()


@pytest.fixture(scope="module")
def sizes_store(tmp_path_factory):
    """Twenty-four images, half of them of one tile and half of many."""
    path = tmp_path_factory.mktemp("tiled") / "store"
    records = [random_record(f"r{i}", 1 + i % 4, i) if i % 2 else record_of(90 + i, 70 + i, f"r{i}") for i in range(24)]
    write_store(records, path)
    return Store(path), records


def tiled_run(store: Store, **data):
    buckets = [{"length": length, "answers": 60} for length in (220, 260)]
    return run(store.path, mix={"bbox2caption": 1.0}, regions_per_row=1, data={"buckets": buckets, **data})


def test_every_row_fits_the_bucket_that_its_images_size_asks_for(sizes_store, tiled, chat):
    store, records = sizes_store
    assert store.sizes.tolist() == [[record.width, record.height] for record in records]
    loader = Loader(tiled_run(store), tiled, chat, 0, 1)
    lengths, questions = Counter(), 0
    for micro_batches in loader.batches():
        for batch in micro_batches:
            assert batch.skipped == ()
            lengths[batch.token_ids_BS.shape[1]] += 1
            questions += batch.questions
    assert questions == sum(len(record.regions) for record in records) and len(lengths) > 1
    images = np.arange(store.records)
    prefixes = loader.plan.prefixes[0].tokens_of(images)
    assert prefixes.tolist() == [chat.prefix_length(int(image_tokens(r.width, r.height, tiled))) for r in records]


def test_held_out_prompts_of_unlike_tilings_come_in_one_shape(sizes_store, tiled, chat):
    store, records = sizes_store
    by_id = {record.id: record for record in records}
    lengths = set()
    for prompts, asked in held_out(store, ("bbox2caption",), chat, tiled, 4, 24):
        assert prompts.pixels_B3RR.shape == (4, 7, 3, 32, 32)
        lengths.add(prompts.token_ids_BS.shape[1])
        for row, (record_id, _, question, *_) in enumerate(asked):
            record = by_id[record_id]
            prefix = chat.prefix_length(int(image_tokens(record.width, record.height, tiled)))
            ids = prompts.token_ids_BS[row, : prompts.lengths_B[row]].tolist()
            assert ids[prefix:] == chat.question_ids(question)
            np.testing.assert_array_equal(prompts.pixels_B3RR[row], to_views(decode(record.image, 10**6), tiled))
    assert len(lengths) == 1


def test_what_tiling_cannot_use_is_named(sizes_store, tiled, chat, tmp_path):
    store, _ = sizes_store
    short, long = chat.prefix_length(8), chat.prefix_length(28)
    with pytest.raises(ValueError, match=rf"\b{short} .*\b{short} "):
        Loader(tiled_run(store, buckets=[{"length": short, "answers": 9}]), tiled, chat, 0, 1)
    with pytest.raises(ValueError, match=rf"\b{long} .*\b{long} "):
        Loader(tiled_run(store, buckets=[{"length": long, "answers": 9}]), tiled, chat, 0, 1)
    write_store([random_record("r", 2, 0)], tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["bytes"]["sizes.u4"], manifest["sha256"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"old\b.*vision\.tiling"):
        Loader(tiled_run(Store(tmp_path / "old")), tiled, chat, 0, 1)
    Loader(tiled_run(Store(tmp_path / "old")), tiled.model_copy(update={"tiles": 0}), chat, 0, 1)
    (tmp_path / "odd.yaml").write_text("{image_size: 24, patch_size: 8, width: 8, layers: 2, heads: 1, mlp: 8}")
    odd = run_config(model={"vision": str(tmp_path / "odd.yaml")}, vision={"tiling": 2})
    with pytest.raises(ValueError, match=r"vision\.tiling.*2 x 2.*3 x 3"):
        resolve_models(odd)


@pytest.mark.parametrize("stage, shortest", [("projector", 2), ("stage1", 3), ("stage2", 3)])
def test_the_shipped_configurations_have_buckets_for_every_tiling(stage, shortest):
    """The first holds images of `shortest` views with their text, the last those of all views with long answers."""
    config = load_config(CONFIGS / f"{stage}_highres.yaml")
    vision, language = resolve_models(config)
    assert (vision.tiles, vision.view_tokens, vision.image_tokens, vision.token_width) == (6, 256, 1792, 4608)
    text = Chat(byte_tokenizer(language.chat), language.chat, plain=config.stage_spec.plain).prefix_length(0)
    lengths = [bucket.length for bucket in config.data.buckets]
    assert lengths[0] > text + shortest * 256 and lengths[-1] > text + vision.image_tokens + config.data.buckets[-1].answers - 100
    assert config.local_micro_batches(128) == 2
