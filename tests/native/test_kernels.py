"""The C++ kernels against their definitions in float64, with every instruction set that this processor has."""
import numpy as np
import pytest

from granvit import native
from tests.native import oracle

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=["base", "avx2", "avx512"])
def loops(request, kernels):
    functions = native.functions()
    functions.granvit_limit_instruction_set(["base", "avx2", "avx512"].index(request.param))
    if native.instruction_set() != request.param:
        functions.granvit_limit_instruction_set(2)
        pytest.skip(f"this processor has no {request.param}")
    yield
    functions.granvit_limit_instruction_set(2)


@pytest.mark.parametrize("case", oracle.ATTENTION)
def test_attention_equals_its_definition(loops, case):
    oracle.assert_near(oracle.run_attention(*oracle.ATTENTION[case]), oracle.attention(*oracle.ATTENTION[case]))


@pytest.mark.parametrize("case", oracle.ROI_ALIGN)
def test_roi_align_equals_its_definition(loops, case):
    oracle.assert_near(oracle.run_roi_align(*oracle.ROI_ALIGN[case]), oracle.roi_align(*oracle.ROI_ALIGN[case]))


@pytest.mark.parametrize("definition, shapes", [
    (lambda q, k, v, dout: oracle.attention(q, k, v, np.array([oracle.packed(3, 2, 2)]), dout),
     [(1, 2, 7, 3), (1, 1, 7, 3), (1, 1, 7, 3), (1, 2, 7, 3)]),
    (lambda features, dout: oracle.roi_align(features, oracle.boxes((0.1, 0.2, 0.7, 0.9), (0, 0, 1, 0.4)), 2, dout),
     [(1, 3, 4, 2), (1, 2, 2, 2, 2)]),
], ids=["attention", "roi_align"])  # fmt: skip
def test_the_definitions_gradients_are_differences(definition, shapes):
    *arguments, dout = (oracle.normal([1, n], *shape).astype(np.float64) for n, shape in enumerate(shapes))
    for x, gradient in zip(arguments, definition(*arguments, dout)[1:], strict=True):
        for place in list(np.ndindex(*x.shape))[::5]:
            value, losses = x[place], []
            for step in (1e-5, -1e-5):
                x[place] = value + step
                losses.append((definition(*arguments, dout)[0] * dout).sum())
            x[place] = value
            assert gradient[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-8)


def test_large_scores_do_not_overflow(loops):
    q, k, v, segments, dout = oracle.attention_case(1, 1, 1, 40, 110, 8)
    arguments = q * 300, k, v, segments, dout
    out, expected = oracle.run_attention(*arguments)[0], oracle.attention(*arguments)[0]
    assert np.abs(out - expected).max() < 1e-3  # scores of about 1000 are known to 6e-5


def test_what_is_not_a_number_stays_so(loops):
    """A NaN in a query, in a key that some queries do not see, and scores beyond float32."""
    q, k, v, segments, dout = oracle.attention_case(1, 2, 1, 60, 60, 8, oracle.packed(20, 20, 20))
    q[0, 0, 33, 2] = np.nan
    k[0, 0, 45, 1] = np.nan
    oracle.assert_near(oracle.run_attention(q, k, v, segments, dout)[:1], oracle.attention(q, k, v, segments, dout)[:1])
    q[0, 1, 5], k[0, 0, 5] = 3e38, 3e38
    out, *gradients = oracle.run_attention(q, k, v, segments, dout)
    assert np.isnan(out[0, 1, 5]).all() and all(np.isnan(x).any() for x in gradients)


@pytest.mark.parametrize("run, arguments", [
    (oracle.run_attention, oracle.attention_case(1, 4, 2, 300, 300, 32, oracle.packed(200, 50, 50))),
    (oracle.run_roi_align, oracle.roi_align_case(2, 16, 16, 1200, 16, oracle.boxes((0, 0, 1, 1), (0.1, 0.2, 0.5, 0.4), images=2)))
], ids=["attention", "roi_align"])  # fmt: skip
def test_the_number_of_threads_changes_no_bit(run, arguments):
    """The sizes are worth several threads (`WORTH_A_THREAD` in kernels.cpp)."""
    results = []
    for threads in (1, 2):
        native.functions().granvit_limit_threads(threads)
        results.append(run(*arguments))
    native.functions().granvit_limit_threads(0)
    assert all(np.array_equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("name, shapes", [
    ("q_BHSD", ((1, 4, 8), (1, 2, 8, 6), (1, 2, 8, 6), None)),
    ("q_BHSD", ((1, 0, 8, 6), (1, 2, 8, 6), (1, 2, 8, 6), None)),
    ("q_BHSD", ((1, 4, 8, 0), (1, 2, 8, 0), (1, 2, 8, 0), None)),
    ("k_BGLD", ((1, 4, 8, 6), (1, 3, 8, 6), (1, 3, 8, 6), None)),
    ("k_BGLD", ((1, 4, 8, 6), (2, 2, 8, 6), (2, 2, 8, 6), None)),
    ("k_BGLD", ((1, 4, 8, 6), (1, 2, 8, 5), (1, 2, 8, 5), None)),
    ("k_BGLD", ((1, 4, 8, 6), (1, 2, 0, 6), (1, 2, 0, 6), None)),
    ("v_BGLD", ((1, 4, 8, 6), (1, 2, 8, 6), (1, 2, 9, 6), None)),
    ("segments_BS", ((1, 4, 8, 6), (1, 2, 8, 6), (1, 2, 8, 6), (1, 7))),
    ("segments_BS", ((1, 4, 8, 6), (1, 2, 9, 6), (1, 2, 9, 6), (1, 8))),
])  # fmt: skip
def test_a_shape_of_attention_that_does_not_fit_is_named(name, shapes):
    with pytest.raises(ValueError, match=name):
        native.check_attention(*shapes)


@pytest.mark.parametrize("name, shapes", [
    ("features_BHWC", ((2, 3, 4), (2, 1, 4), 2)),
    ("features_BHWC", ((2, 0, 4, 8), (2, 1, 4), 2)),
    ("boxes_BK4", ((2, 3, 4, 8), (1, 1, 4), 2)),
    ("boxes_BK4", ((2, 3, 4, 8), (2, 1, 5), 2)),
    ("grid", ((2, 3, 4, 8), (2, 1, 4), 0)),
])  # fmt: skip
def test_a_shape_of_roi_align_that_does_not_fit_is_named(name, shapes):
    with pytest.raises(ValueError, match=name):
        native.check_roi_align(*shapes)
