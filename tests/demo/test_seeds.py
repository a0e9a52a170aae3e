"""The demo's scores over seeds."""
import numpy as np
import pytest

from granvit.demo.results import percent, read_runs
from granvit.demo.seeds import compare_seeds
from tests.demo.toy_demo import right, write_run


def demo(root, number: int):
    write_run(root, "stage1", {0: right(0, 1), 8: right(0.6, number)})
    write_run(root, "stage2", {8: right(0.7, 10 + number)}, 60)
    return root


def test_means_and_spread_are_those_of_the_runs(tmp_path):
    roots = {seed: demo(tmp_path / str(seed), seed) for seed in (3, 5, 8)}
    table = compare_seeds(roots)
    assert "seeds 3, 5, 8" in table and table.count("\n") == 5
    each = [percent(read_runs(root)["stage2"].last, "acc_iou50").value for root in roots.values()]
    assert len(set(each)) > 1
    shown = f"{np.mean(each):.1f} ({np.std(each, ddof=1):.1f}; {', '.join(f'{value:.1f}' for value in each)})"
    assert shown in next(line for line in table.splitlines() if "ACC@IoU0.5" in line)


def test_what_cannot_be_compared_is_named(tmp_path):
    first = demo(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="--seeds"):
        compare_seeds({0: first})
    with pytest.raises(ValueError, match="missing"):
        compare_seeds({0: first, 1: tmp_path / "missing"})
    other = tmp_path / "b"
    write_run(other, "stage1", {0: right(0, 1), 8: right(0.6, 2)})
    with pytest.raises(ValueError, match="after stage 2"):
        compare_seeds({0: first, 1: other})
    write_run(tmp_path / "c", "stage1", {0: right(0, 1), 4: right(0.6, 2)})
    with pytest.raises(ValueError, match="not finished"):
        compare_seeds({0: tmp_path / "c", 1: first})
