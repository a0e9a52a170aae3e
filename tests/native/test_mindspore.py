"""The kernels as custom operators of MindSpore: in the static graph, in PyNative, without the library."""
import importlib.util

import numpy as np
import pytest

from granvit import native as core
from tests.native import oracle

ms = pytest.importorskip("mindspore")


@pytest.fixture(scope="module")
def native(kernels):
    from ms_granvit.ops import native

    return native


@pytest.fixture(params=["graph", "pynative"])
def differentiate(request):
    """Values and gradients of `function(*tensors)` with the gradient `dout` at its output, as arrays."""

    def run(function, positions, tensors, dout):
        def weighed(*tensors):
            out = function(*tensors)
            return (out * dout).sum(), out

        both = ms.value_and_grad(weighed, positions, has_aux=True)
        (_, out), gradients = (ms.jit(both) if request.param == "graph" else both)(*tensors)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return [x.asnumpy() for x in (out, *gradients)]

    return run


@pytest.mark.parametrize("case", ["head width 72", "shared prefix", "more keys than queries"])
def test_mindspore_attention_equals_its_definition(native, differentiate, case):
    q, k, v, segments, dout = (None if x is None else ms.Tensor(x) for x in oracle.ATTENTION[case])

    def attention(q, k, v):
        return native.attention(q, k, v, segments)

    found = differentiate(attention, (0, 1, 2), (q, k, v), dout)
    oracle.assert_near(found, oracle.attention(*oracle.ATTENTION[case]))


@pytest.mark.parametrize("case", ["two images", "NaN"])
def test_mindspore_roi_align_equals_its_definition(native, differentiate, case):
    features, boxes, grid, dout = oracle.ROI_ALIGN[case]
    features, boxes, dout = map(ms.Tensor, (features, boxes, dout))

    def roi_align(features):
        return native.roi_align(features, boxes, grid)

    oracle.assert_near(differentiate(roi_align, 0, (features,), dout), oracle.roi_align(*oracle.ROI_ALIGN[case]))


def test_mindspore_without_boxes(native):
    features, boxes, grid, dout = oracle.ROI_ALIGN["no box"]
    assert native.roi_align(ms.Tensor(features), ms.Tensor(boxes), grid).shape == dout.shape


def test_mindspore_segments_may_be_differentiated_past(native, differentiate):
    """Segments as an argument of the graph, as in a training step."""
    *inputs, dout = map(ms.Tensor, oracle.ATTENTION["rows of different segments"])
    found = differentiate(native.attention, (0, 1, 2), inputs, dout)
    oracle.assert_near(found, oracle.attention(*oracle.ATTENTION["rows of different segments"]))


def test_mindspore_attention_with_and_without_segments_in_one_graph(native, differentiate):
    """MindSpore keeps one gradient for each name of an operator."""
    q, k, v, segments, dout = oracle.ATTENTION["rows of different segments"]

    def both(q, k, v, segments):
        return native.attention(q, k, v, segments) + native.attention(q, k, v, None)

    found = differentiate(both, (0, 1, 2), [ms.Tensor(x) for x in (q, k, v, segments)], ms.Tensor(dout))
    masked, unmasked = (oracle.attention(q, k, v, mask, dout) for mask in (segments, None))
    expected = [a + b for a, b in zip(masked, unmasked, strict=True)]
    oracle.assert_near(found, expected)


def test_mindspore_tensors_that_are_not_contiguous(native, differentiate):
    q, k, v, _, dout = oracle.ATTENTION["head width 72"]
    turned = [ms.Tensor(np.ascontiguousarray(x.transpose(0, 2, 1, 3))) for x in (q, k, v)]

    def attention(q, k, v):
        return native.attention(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), None)

    out, *gradients = differentiate(attention, (0, 1, 2), turned, ms.Tensor(dout))
    found = [out, *(x.transpose(0, 2, 1, 3) for x in gradients)]
    oracle.assert_near(found, oracle.attention(*oracle.ATTENTION["head width 72"]))


def test_mindspore_a_wrong_argument_is_named(native, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MindSpore writes the graph that it could not compile
    q, k, v, segments, _ = map(ms.Tensor, oracle.ATTENTION["rows of different segments"])
    graph = ms.jit(native.attention)
    for run in (native.attention, graph):
        with pytest.raises(ValueError, match="segments_BS is int64"):
            run(q, k, v, segments.astype(ms.int64))
        with pytest.raises(ValueError, match="v_BGLD has shape"):
            run(q, k, v[:, :, :4], segments)
    with pytest.raises(ValueError, match="boxes_BK4 has shape"):
        native.roi_align(ms.ops.ones((1, 2, 2, 3)), ms.ops.ones((2, 1, 4)), 2)


def test_mindspore_without_the_library_the_error_says_how_to_get_it(native, monkeypatch):
    monkeypatch.setattr(core, "NAME", "absent.so")
    spec = importlib.util.spec_from_file_location("without_library", native.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"python -m granvit\.native"):
        module.attention(*map(ms.Tensor, oracle.ATTENTION["one query"][:4]))
    with pytest.raises(ValueError, match=r"python -m granvit\.native"):
        module.roi_align(ms.ops.ones((1, 2, 2, 3)), ms.ops.ones((1, 1, 4)), 2)


@pytest.mark.parametrize("folder, allowed, named", [
    ("with:colon", None, "no path with a colon"), ("", "/nowhere", "MS_CUSTOM_AOT_WHITE_LIST=/nowhere"), ("", "", None),
])  # fmt: skip
def test_mindspore_a_path_that_custom_operators_refuse_is_said_and_composed_runs(kernels, monkeypatch, tmp_path, folder, allowed,
                                                                                 named):  # fmt: skip
    from ms_granvit.ops.table import kernels_for

    monkeypatch.setattr(core, "library", lambda: tmp_path / folder / "kernels.so")
    monkeypatch.delenv("MS_CUSTOM_AOT_WHITE_LIST", raising=False)
    if allowed is not None:
        monkeypatch.setenv("MS_CUSTOM_AOT_WHITE_LIST", allowed or str(tmp_path))
    picked = kernels_for("cpu", ms.float32, {"roi_align": "native"})
    assert picked.row("roi_align", grid=2).name == ("native" if named is None else "composed")
    assert named is None or named in picked.hints[0]
