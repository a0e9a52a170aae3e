"""Which runs are one column of a probe."""
from types import SimpleNamespace

from granvit.probe.seeds import seed_groups
from tests.helpers import run_config


def checkpoint(seed: int, step: int = 2, **keys) -> SimpleNamespace:
    return SimpleNamespace(step=step, config=run_config(seed=seed, output=f"runs/{seed}", **keys))


def test_runs_that_differ_only_in_seed_and_place_are_joined():
    found = seed_groups({
        "a0": checkpoint(0, distill={"weight": 0.0}), "b0": checkpoint(0), "b7": checkpoint(7), "late": checkpoint(3, step=4),
        "a7": checkpoint(7, distill={"weight": 0.0}, model={"init_from": "runs/other"}),
    })  # fmt: skip
    assert found == {"distill.weight=0.0": {0: "a0", 7: "a7"}, "distill.weight=1.0": {0: "b0", 7: "b7"}}


def test_one_group_is_named_after_its_first_run():
    assert seed_groups({"x/s1": checkpoint(1), "x/s2": checkpoint(2)}) == {"x/s1 and other seeds": {1: "x/s1", 2: "x/s2"}}


def test_runs_of_one_seed_keep_their_own_columns():
    """The same run trained in two frameworks, for example."""
    assert seed_groups({"mindspore": checkpoint(0), "torch": checkpoint(0), "torch1": checkpoint(1)}) == {}
