"""Batches and configurations for the engines' tests, built by hand: independent of the packer."""
from dataclasses import replace

import numpy as np

from granvit.config import RunConfig, parse_config
from granvit.data.batch import Batch
from granvit.models import LanguageConfig, VisionConfig

PREFIX_BEFORE, PREFIX_AFTER = 5, 2  # text tokens of the prefix around the image tokens


def run_config(**sections) -> RunConfig:
    """A tiny stage-1 run; keyword sections are merged over it."""
    tree = {
        "stage": "stage1",
        "output": "unused",
        "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random"},
        "data": {"sources": [{"path": "unused"}], "regions_per_row": 2, "buckets": [{"length": 64, "answers": 16}]},
        "train": {"global_batch": 4, "micro_batch": 2},
        "optimizer": {"lr": 1e-2},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return parse_config(tree, "test")


def random_batch(vision: VisionConfig, language: LanguageConfig, rows: int, regions: int, length: int, answers: int,
                 seed: int, crop: int | None = None) -> Batch:  # fmt: skip
    """Rows of one image and `regions` questions of unlike lengths, each with a box; padded to `length` and `answers`."""
    rng = np.random.default_rng(seed)
    N, crop = vision.patches, crop or vision.image_size
    prefix = PREFIX_BEFORE + N + PREFIX_AFTER
    tokens = rng.integers(1, language.vocab, (rows, length)).astype(np.int32)
    positions = np.zeros((rows, length), np.int32)
    segments = np.full((rows, length), -1, np.int32)
    at, targets = np.zeros((rows, answers), np.int32), np.zeros((rows, answers), np.int32)
    weights = np.zeros((rows, answers), np.float32)
    for row in range(rows):
        positions[row, :prefix], segments[row, :prefix] = np.arange(prefix), 0
        start, used = prefix, 0
        for region in range(regions):
            question, answer = int(rng.integers(2, 5)), int(rng.integers(1, 4))
            size = question + answer
            assert start + size <= length and used + answer <= answers, "length or answers too small for the test's rows"
            positions[row, start : start + size] = prefix + np.arange(size)
            segments[row, start : start + size] = region + 1
            at[row, used : used + answer] = start + question - 1 + np.arange(answer)
            targets[row, used : used + answer] = tokens[row, start + question : start + size]
            weights[row, used : used + answer] = 1
            start, used = start + size, used + answer
    corners = np.sort(rng.uniform(0, 1, (rows, regions, 2, 2)), axis=2)
    return Batch(
        pixels_B3RR=rng.integers(0, 256, (rows, 3, vision.image_size, vision.image_size)).astype(np.uint8),
        image_weights_B=np.ones(rows, np.float32),
        token_ids_BS=tokens,
        positions_BS=positions,
        segments_BS=segments,
        image_positions_BN=np.tile(np.arange(PREFIX_BEFORE, PREFIX_BEFORE + N, dtype=np.int32), (rows, 1)),
        answer_positions_BA=at,
        answer_targets_BA=targets,
        answer_weights_BA=weights,
        boxes_BK4=corners.reshape(rows, regions, 4).astype(np.float32),
        box_weights_BK=np.ones((rows, regions), np.float32),
        crops_BK3rr=rng.integers(0, 256, (rows, regions, 3, crop, crop)).astype(np.uint8),
        record_ids=tuple(f"row-{row}" for row in range(rows)),
        questions=rows * regions,
    )


def separate_rows(batch: Batch) -> Batch:
    """Every question of a packed batch in a row of its own (same shapes, one box a row at most): what packing must equal."""
    rows, pick = [], lambda row: {k: v[row : row + 1].copy() for k, v in vars(batch).items() if isinstance(v, np.ndarray)}
    for row in range(len(batch.record_ids)):
        segments = batch.segments_BS[row]
        prefix = int((segments == 0).sum())
        for segment in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == segment)
            one = pick(row)
            one["segments_BS"][:] = -1
            one["segments_BS"][0, :prefix] = 0
            one["segments_BS"][0, prefix : prefix + len(own)] = 1
            one["token_ids_BS"][0, prefix : prefix + len(own)] = batch.token_ids_BS[row, own]
            one["positions_BS"][0] = np.arange(batch.positions_BS.shape[1])
            for name in ("answer_positions_BA", "answer_targets_BA", "answer_weights_BA"):
                one[name][:] = 0
            mine = np.flatnonzero(np.isin(batch.answer_positions_BA[row], own) & (batch.answer_weights_BA[row] > 0))
            one["answer_positions_BA"][0, : len(mine)] = batch.answer_positions_BA[row, mine] - own[0] + prefix
            one["answer_targets_BA"][0, : len(mine)] = batch.answer_targets_BA[row, mine]
            one["answer_weights_BA"][0, : len(mine)] = 1
            one["box_weights_BK"][:] = 0
            one["box_weights_BK"][0, segment - 1] = batch.box_weights_BK[row, segment - 1]
            rows.append(one)
    joined = {key: np.concatenate([one[key] for one in rows]) for key in rows[0]}
    ids = tuple(f"question-{i}" for i in range(len(rows)))
    return replace(batch, **joined, record_ids=ids, questions=len(rows))
