"""How errors are judged: real differences fail, rounding errors pass."""
import numpy as np
import pytest

from parity.compare import CARRIED_FACTOR, FLOOR_UNITS, RATIO, ROUNDOFF, compare_suite, verdicts

FLOOR = FLOOR_UNITS["float32"][0] * ROUNDOFF["float32"]
GOLDEN = {
    "forward/block.0.linear": np.linspace(-1, 1, 40).reshape(4, 10),
    "forward/block.1.linear": np.linspace(1, 2, 40).reshape(4, 10),
    "gradient/block.0.attn.q_proj.bias": np.linspace(0.1, 1, 10),
    "gradient/block.0.attn.k_proj.bias": np.full(10, 1e-17),  # truly zero
}


def off(by: float, *names: str) -> dict[str, np.ndarray]:
    """The golden tensors; those of `names` have the relative error `by`."""
    return {n: (g * (1 + by) if n in names else g) for n, g in GOLDEN.items()}


def judge(candidate, peer=GOLDEN):
    return list(compare_suite("suite", GOLDEN, peer, candidate, "float32"))


def failed(rows) -> list[str]:
    return [f"{row.kind}/{row.name}" for row in rows if not row.passed]


def test_the_same_numbers_pass():
    assert failed(judge(GOLDEN)) == []


def test_an_error_below_the_floor_passes_and_above_it_fails():
    assert failed(judge(off(0.9 * FLOOR, "forward/block.1.linear"))) == []
    assert failed(judge(off(1.1 * FLOOR, "forward/block.1.linear"))) == ["forward/block.1.linear"]


def test_what_many_steps_made_has_the_floor_of_the_gradients_that_made_it():
    name = "forward/block.1.linear"
    for suite in ("trajectory", "trajectory2"):
        assert failed(compare_suite(suite, GOLDEN, GOLDEN, off(0.9 * CARRIED_FACTOR * FLOOR, name), "float32")) == []
        assert failed(compare_suite(suite, GOLDEN, GOLDEN, off(1.1 * CARRIED_FACTOR * FLOOR, name), "float32")) == [name]


def test_what_came_back_through_the_whole_model_has_a_wider_floor_unless_its_module_stood_alone():
    name = "gradient/block.0.attn.q_proj.bias"
    assert failed(judge(off(0.9 * CARRIED_FACTOR * FLOOR, name))) == []
    assert failed(judge(off(1.1 * CARRIED_FACTOR * FLOOR, name))) == [name]
    alone = compare_suite("isolated", GOLDEN, GOLDEN, off(1.1 * FLOOR, name), "float32")
    assert failed(alone) == [name]


def test_the_peers_own_rounding_earns_tolerance():
    name, earned = "forward/block.0.linear", 10 * FLOOR
    assert failed(judge(off(0.95 * RATIO * earned, name), off(earned, name))) == []
    assert failed(judge(off(1.05 * RATIO * earned, name), off(earned, name))) == [name]


def test_a_peer_that_is_itself_wrong_earns_nothing():
    name = "forward/block.0.linear"
    (row,) = (row for row in judge(off(0.01, name), off(0.01, name)) if not row.passed)
    assert "PyTorch itself" in row.reason


def test_one_wrong_element_is_not_drowned_by_the_norm():
    name = "forward/block.1.linear"
    golden = {name: np.ones((1000, 1000))}
    wrong = golden[name].copy()
    wrong[3, 5] += 1e-3  # 1e-6 of the norm
    (row,) = compare_suite("suite", golden, golden, {name: wrong}, "float32")
    assert row.error[0] < FLOOR and not row.passed


def test_a_gradient_whose_true_value_is_zero_is_judged_by_its_layer():
    name = "gradient/block.0.attn.k_proj.bias"
    rounding = {**GOLDEN, name: np.full(10, 1e-8)}  # of the layer's scale, about 1
    assert failed(judge(rounding)) == []
    assert failed(judge({**GOLDEN, name: np.full(10, 1e-3)})) == [name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_fail(value):
    name = "forward/block.0.linear"
    broken = GOLDEN[name].copy()
    broken[1, 2] = value
    rows = judge({**GOLDEN, name: broken})
    assert failed(rows) == [name]
    assert verdicts(rows)[0].worst.name == "block.0.linear"


def test_missing_and_extra_names_and_other_shapes_fail():
    name = "forward/block.0.linear"
    assert failed(judge({k: v for k, v in GOLDEN.items() if k != name})) == [name]
    assert failed(judge({**GOLDEN, "forward/new": np.ones(3)})) == ["forward/new"]
    assert failed(judge({**GOLDEN, name: GOLDEN[name].T})) == [name]


def test_the_verdict_names_the_first_in_order_of_execution():
    rows = judge(off(1e-2, "forward/block.0.linear") | {"forward/block.1.linear": GOLDEN["forward/block.1.linear"] * 3})
    (verdict,) = verdicts(rows)
    assert verdict.first.name == "block.0.linear" and verdict.failed == 2 and verdict.worst.name == "block.1.linear"


def test_tokens_must_be_equal():
    golden = {"tokens/greedy": np.arange(6).reshape(2, 3)}
    other = {"tokens/greedy": np.array([[0, 1, 2], [3, 4, 6]])}
    (row,) = compare_suite("generate", golden, golden, other, "float32")
    assert row.reason == "17% of the tokens differ"
