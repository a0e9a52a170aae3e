"""The mutations themselves: each is one change, of the files that compute, and is named so that it can be found again."""
import ast
import difflib

import pytest
import yaml

from tests import mutate

SOURCE = '''
class Block:
    """A block."""

    def __init__(self, eps: float = 1e-6):
        self.eps = eps

    def construct(self, q, k):
        """Docstrings stay."""
        if q is None:
            raise ValueError("no q")
        x = q * k[..., :1] + 0.5
        x = x + self.eps
        return ops.maximum(x, k)

    def save_pretrained(self):
        return 1 + 1
'''


def test_one_place_changes_at_a_time():
    found = mutate.mutants("x.py", SOURCE)
    before = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in found:
        lines = [line for line in difflib.ndiff(before, mutate.changed(SOURCE, mutant).splitlines()) if line[0] in "-+"]
        assert len(lines) == 2, mutant
    changes = {mutant.change for mutant in found}
    assert {"`x + self.eps` -> `x - self.eps`", "`x + self.eps` -> `x`", "`x = x + self.eps` dropped", "`0.5` -> `0.55`",
            "`:1` -> `1:`", "`ops.maximum(x, k)` -> `x`", "`ops.maximum` -> `ops.minimum`", "`q` -> `k`"} <= changes  # fmt: skip
    assert not any("1 + 1" in change or "no q" in change or "1e-06" in change for change in changes)
    assert len({mutant.key for mutant in found}) == len(found)


def test_every_mathematical_file_has_mutants_and_a_sample_is_the_same_again():
    found = mutate.all_mutants(mutate.ROOT / mutate.PACKAGE)
    assert {mutant.file for mutant in found} == set(mutate.FILES) and len(found) > 1000
    assert [mutant.key for mutant in found] == [mutant.key for mutant in mutate.all_mutants(mutate.ROOT / mutate.PACKAGE)]


def test_those_called_equivalent_exist_and_have_a_reason():
    keys = {mutant.key for mutant in mutate.all_mutants(mutate.ROOT / mutate.PACKAGE)}
    for key, reason in yaml.safe_load(mutate.EQUIVALENT.read_text()).items():
        assert key in keys, f"{key}: no such mutant; take it out of {mutate.EQUIVALENT.name}"
        assert len(reason) > 20, key


@pytest.mark.parametrize("work, how", [
    (lambda: {"how": "diverged", "where": "here"}, "diverged"), (lambda: 1 / 0, "raised"), (lambda: mutate.os._exit(3), "raised"),
])  # fmt: skip
def test_a_process_that_errs_or_ends_is_an_answer(work, how):
    assert mutate.in_fork(work)["how"] == how


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(mutate, "TIMEOUT", 0.2)
    assert mutate.in_fork(lambda: mutate.time.sleep(60))["how"] == "timed out"


def test_the_summary_counts_without_equivalents(monkeypatch):
    monkeypatch.setattr(mutate, "equivalents", lambda: {"c": "the same product"})
    result = lambda how, by: {"how": how, "by": by, "line": 1}  # noqa: E731
    made = {"a": result("diverged", "step"), "b": result("raised", "option tiled"), "c": result("", ""), "d": result("", "")}
    said = mutate.summary(made)
    assert "4 mutants, 1 of them equivalent programs; of 3:" in said
    assert "default fixture: 1 (33.3%), 0 of them by an error" in said and "all checks: 2 (66.7%), 1 of them" in said
    assert "NOT NOTICED: d (line 1)" in said and "NOT NOTICED: c" not in said
