"""A grid of tiny runs over two stores that share no image."""
from pathlib import Path

import pytest
import yaml

from granvit.data.store_writer import write_store
from tests.conftest import random_record


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ablation")
    write_store([random_record(f"t{i}", 3, i) for i in range(12)], folder / "train")
    write_store([random_record(f"h{i}", 2, 100 + i) for i in range(20)], folder / "held")
    return {name: str(folder / name) for name in ("train", "held")}


@pytest.fixture(scope="session")
def base(stores, tmp_path_factory) -> Path:
    """A directory with stage1.yaml and stage2.yaml."""
    folder = tmp_path_factory.mktemp("base")
    tree = {
        "output": "unset",
        "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random", "weights_language": "none"},
        "data": {"sources": [{"path": stores["train"]}], "regions_per_row": 2, "buckets": [{"length": 512, "answers": 256}]},
        "train": {"global_batch": 2, "micro_batch": 2, "epochs": 9, "steps": 4, "checkpoint_every": 2},
        "eval": {"source": stores["held"], "rows": 0, "batch": 16, "max_new_tokens": 4},
    }
    for stage in ("stage1", "stage2"):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({"stage": stage, **tree}))
    return folder


def grid_tree(base: Path, **changes) -> dict:
    """A grid of two settings, as a tree of keys; `changes` replace keys."""
    return {
        "question": "Does self-distillation help?",
        "stages": {stage: {"config": str(base / f"{stage}.yaml")} for stage in ("stage1", "stage2")},
        "settings": {"without": {"stage1": ["distill.weight=0"]}, "with": {"stage1": []}},
        "seeds": [0, 1],
        "metrics": ["bbox2caption/exact_match", "caption2bbox/acc_iou50"],
        "directions": [
            {"metric": "bbox2caption/exact_match", "above": "with", "below": "without", "paper": "Table 3: 75.55 against 75.06"}
        ],
    } | changes  # fmt: skip


def write_grid(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
