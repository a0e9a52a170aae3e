"""Which runs are one column of a probe."""
import pytest

from granvit.checkpoint.run import newest_checkpoint
from granvit.probe.seeds import seed_groups
from tests.probe.conftest import VISION, write_run


@pytest.fixture
def run(trained_on, tmp_path):
    """Writes a run and opens its checkpoint."""

    def write(name: str, seed: int, weight: float = 1.0, init_from: str | None = None):
        origin = None if init_from is None else tmp_path / init_from
        write_run(tmp_path / name, VISION, trained_on, seed=seed, weight=weight, init_from=origin)
        return newest_checkpoint(tmp_path / name)

    return write


def test_runs_that_differ_only_in_seed_and_place_are_joined(run):
    found = seed_groups({"a0": run("a0", 0, 0.0), "b0": run("b0", 0), "b7": run("b7", 7), "a7": run("a7", 7, 0.0)})
    assert found == {"distill.weight=0.0": {0: "a0", 7: "a7"}, "distill.weight=1.0": {0: "b0", 7: "b7"}}


def test_the_runs_before_must_be_alike_too(run):
    """Fine-tuning with one configuration after two settings of stage 1 is two settings."""
    for seed in (0, 1, 2):
        run(f"with{seed}", seed)
        run(f"without{seed}", seed, 0.0)
    later = {f"after_with{seed}": run(f"later_with{seed}", seed, init_from=f"with{seed}") for seed in (0, 1)}
    mixed = later | {"after_without2": run("later_without2", 2, init_from="without2")}
    assert list(seed_groups(mixed).values()) == [{0: "after_with0", 1: "after_with1"}]
    both = mixed | {"after_without0": run("later_without0", 0, init_from="without0")}
    named = seed_groups(both)
    assert list(named) == ["0.stage1.distill.weight=1.0", "0.stage1.distill.weight=0.0"]
    assert list(named.values()) == [{0: "after_with0", 1: "after_with1"}, {2: "after_without2", 0: "after_without0"}]


def test_runs_of_another_store_are_not_joined(run, trained_on, tmp_path):
    first = run("first", 0)
    write_run(tmp_path / "other", VISION, trained_on, recorded="0" * 16, seed=1)
    assert seed_groups({"first": first, "other": newest_checkpoint(tmp_path / "other")}) == {}


def test_one_group_is_named_after_its_first_run(run):
    assert seed_groups({"x/s1": run("s1", 1), "x/s2": run("s2", 2)}) == {"x/s1 and other seeds": {1: "x/s1", 2: "x/s2"}}


def test_runs_of_one_seed_keep_their_own_columns(run):
    """The same run trained in two frameworks, for example."""
    assert seed_groups({"mindspore": run("m", 0), "torch": run("t", 0), "torch1": run("t1", 1)}) == {}
