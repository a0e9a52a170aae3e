"""Helpers: tiny configurations, checkpoints rewritten in the first format, and packed batches split into single questions."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from granvit.checkpoint.run import state_digest
from granvit.config import RunConfig, parse_config
from granvit.data.batch import Batch


def run_config(**sections) -> RunConfig:
    """A tiny stage-1 run; keyword sections are merged over it."""
    tree = {
        "stage": "stage1",
        "output": "unused",
        "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random"},
        "data": {"sources": [{"path": "unused"}], "regions_per_row": 2, "buckets": [{"length": 64, "answers": 16}]},
        "train": {"global_batch": 2, "micro_batch": 2},
        "optimizer": {"lr": 1e-2},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return parse_config(tree, "test")


def rewrite_as_format_1(checkpoint: Path) -> None:
    """Rewrites state.json in format 1, where `global_batch` counts questions and `built_level` is called `top`."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    state["format"] = 1
    state["config"]["train"]["global_batch"] *= state["config"]["data"]["regions_per_row"]
    built_level = state["vision"].pop("built_level")
    state["vision"]["top"] = None if built_level == state["vision"]["level"] else built_level
    path.write_text(json.dumps({"sha256": state_digest(state)} | state))


def separate_rows(batch: Batch) -> Batch:
    """Each question of a packed batch in a row of its own (same shapes, at most one box a row); results must not change."""
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
