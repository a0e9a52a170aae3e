"""The C++ kernels of the small operators against their definitions in float64, and the same bits everywhere."""
import numpy as np
import pytest

from granvit import native
from tests.native import oracle, small_oracle

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("operator, case", small_oracle.EVERY_CASE)
def test_a_small_operator_equals_its_definition(operator, case):
    run, definition = small_oracle.OPERATORS[operator]
    arguments = small_oracle.CASES[operator][case]
    oracle.assert_near(run(*arguments), definition(*arguments))


@pytest.mark.parametrize("operator", small_oracle.OPERATORS)
def test_the_definitions_gradients_of_small_operators_are_differences(operator):
    if operator == "adamw":
        pytest.skip("a step has no gradient")
    arguments = {
        "layer_norm": small_oracle.norm_case(2, 5, arrays=2), "rms_norm": small_oracle.norm_case(2, 5),
        "rope": small_oracle.rope_case(1, 2, 2, 4), "swiglu": [oracle.normal(n, 5) for n in range(3)],
        "gelu": [oracle.normal(n, 5) for n in range(2)],
    }[operator]  # fmt: skip
    definition = small_oracle.OPERATORS[operator][1]
    *inputs, dout = small_oracle.wide(*arguments)
    for x, gradient in zip(inputs, definition(*inputs, dout)[1:], strict=False):  # rope: x alone
        for place in np.ndindex(*x.shape):
            value, losses = x[place], []
            for step in (1e-5, -1e-5):
                x[place] = value + step
                losses.append((definition(*inputs, dout)[0] * dout).sum())
            x[place] = value
            assert gradient[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-7)


@pytest.mark.parametrize("operator, case", small_oracle.EVERY_CASE)
def test_every_instruction_set_gives_the_same_bits(operator, case):
    run, arguments, results = small_oracle.OPERATORS[operator][0], small_oracle.CASES[operator][case], {}
    for level in range(3):
        native.functions().granvit_limit_instruction_set(level)
        results[native.instruction_set()] = run(*arguments)
    native.functions().granvit_limit_instruction_set(2)
    for found in results.values():
        assert all(np.array_equal(one, two) for one, two in zip(found, results["base"], strict=True))


@pytest.mark.parametrize("operator", small_oracle.OPERATORS)
def test_the_number_of_threads_changes_no_bit_of_a_small_operator(operator):
    big = {"layer_norm": small_oracle.norm_case(9000, 100, arrays=2), "rms_norm": small_oracle.norm_case(9000, 100),
           "rope": small_oracle.rope_case(2, 8, 1000, 64)}  # fmt: skip
    count = {"swiglu": 3, "gelu": 2, "adamw": 5}.get(operator, 0)
    arguments = big.get(operator) or [np.abs(oracle.normal(n, 600_001)) for n in range(count)]
    results = []
    for threads in (1, 2):
        native.functions().granvit_limit_threads(threads)
        results.append(small_oracle.OPERATORS[operator][0](*arguments))
    native.functions().granvit_limit_threads(0)
    assert all(np.array_equal(one, two) for one, two in zip(*results, strict=True))


def test_what_is_not_finite_stays_so_in_small_operators():
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, -3e38], np.float32)
    ones = np.ones_like(x)
    assert np.array_equal(small_oracle.run_gelu(x, ones)[0], [np.nan, np.inf, np.nan, x[3], 0, x[5], 0], equal_nan=True)
    assert np.array_equal(small_oracle.run_gelu(x, ones)[1][[0, 1, 3, 4, 5, 6]], [np.nan, 1, 1, 0, 1, 0], equal_nan=True)
    assert np.array_equal(small_oracle.run_swiglu(x, ones, ones)[0], [np.nan, np.inf, np.nan, x[3], 0, x[5], 0], equal_nan=True)
    rows = np.stack([x, ones])
    for run, arrays in ((small_oracle.run_rms_norm, 1), (small_oracle.run_layer_norm, 2)):
        out = run(rows, *[ones] * arrays, np.ones_like(rows))[0]
        assert np.isnan(out[0, 0]) and np.isfinite(out[1]).all()


def test_no_rows_and_no_numbers():
    none = np.empty((0, 4), np.float32)
    for run, arrays in ((small_oracle.run_rms_norm, 1), (small_oracle.run_layer_norm, 2)):
        _, _, *gradients = run(none, *[np.ones(4, np.float32)] * arrays, none)
        assert all(not x.any() for x in gradients)
    small_oracle.run_gelu(none, none)


@pytest.mark.parametrize("check, name, shapes", [
    (native.check_norm, "x", ((4,), (4,))),
    (native.check_norm, "weight", ((2, 4), (5,))),
    (native.check_norm, "bias", ((2, 4), (4,), (3,))),
    (native.check_rope, "x_BHSD", ((1, 2, 3, 5), (1, 1, 3, 5), (1, 1, 3, 5))),
    (native.check_rope, "cos_B1SD", ((2, 2, 3, 4), (1, 1, 3, 4), (2, 1, 3, 4))),
    (native.check_rope, "sin_B1SD", ((2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 2))),
    (native.check_same_shape, "up", ((2, 4), (2, 3))),
])  # fmt: skip
def test_a_shape_of_a_small_operator_that_does_not_fit_is_named(check, name, shapes):
    with pytest.raises(ValueError, match=name):
        check(*shapes)
