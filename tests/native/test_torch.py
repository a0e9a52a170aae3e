"""The kernels as operators of PyTorch: values, gradients, torch.compile, what is kept for the backward pass."""
import numpy as np
import pytest

from granvit import native as core
from tests.native import oracle

torch = pytest.importorskip("torch")
from pt_granvit.ops import native  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernels")


def tensors(*arrays):
    return [None if x is None else torch.from_numpy(x).requires_grad_(x.dtype == np.float32) for x in arrays]


@pytest.mark.parametrize("case", ["head width 72", "shared prefix", "more keys than queries"])
def test_attention_equals_its_definition(case):
    *inputs, dout = tensors(*oracle.ATTENTION[case])
    out = native.attention(*inputs)
    oracle.assert_near([out.detach().numpy(), *gradients(out, inputs[:3], dout)], oracle.attention(*oracle.ATTENTION[case]))


@pytest.mark.parametrize("case", ["two images", "NaN", "no box", "no image"])
def test_roi_align_equals_its_definition(case):
    features, boxes, grid, dout = oracle.ROI_ALIGN[case]
    features, boxes, dout = tensors(features, boxes, dout)
    out = native.roi_align(features, boxes, grid)
    oracle.assert_near([out.detach().numpy(), *gradients(out, [features], dout)], oracle.roi_align(*oracle.ROI_ALIGN[case]))


def gradients(out, inputs, dout):
    return [x.numpy() for x in torch.autograd.grad(out, inputs, dout)]


def test_tensors_that_are_not_contiguous():
    *arguments, dout = oracle.ATTENTION["head width 72"]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in tensors(*arguments[:3])]
    assert not apart[0].is_contiguous()
    out = native.attention(*apart, None)
    dout = torch.from_numpy(dout).transpose(-1, -2).contiguous().transpose(-1, -2)
    oracle.assert_near([out.detach().numpy(), *gradients(out, apart, dout)], oracle.attention(*oracle.ATTENTION["head width 72"]))
    constant = torch.ones(()).expand(out.shape)  # the gradient of a sum
    expected = oracle.attention(*arguments, np.ones(out.shape, np.float32))[1:]
    oracle.assert_near(gradients(native.attention(*apart, None), apart, constant), expected)
    features, boxes, grid, dout = oracle.ROI_ALIGN["two images"]
    features = torch.from_numpy(np.ascontiguousarray(features.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).requires_grad_()
    boxes = torch.from_numpy(np.asfortranarray(boxes))
    out = native.roi_align(features, boxes, grid)
    found = [out.detach().numpy(), *gradients(out, [features], torch.from_numpy(dout))]
    oracle.assert_near(found, oracle.roi_align(*oracle.ROI_ALIGN["two images"]))


def test_the_operators_obey_the_rules_of_custom_operators():
    for case in ("odd sizes", "rows of different segments"):
        torch.library.opcheck(native.attention_op, tensors(*oracle.ATTENTION[case][:4]))
    features, boxes, grid, _ = oracle.ROI_ALIGN["two images"]
    torch.library.opcheck(native.roi_align_op, (*tensors(features, boxes), grid))


def test_the_gradient_of_the_log_sum_exp():
    q, k, v, _, _ = tensors(*oracle.ATTENTION["more keys than queries"])
    weights = torch.from_numpy(oracle.normal(5, *q.shape[:3]))
    found = torch.autograd.grad((native.attention_op(q, k, v, None)[1] * weights).sum(), (q, k))
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    expected = torch.autograd.grad((scores.logsumexp(-1) * weights).sum(), (q, k))
    oracle.assert_near([x.numpy() for x in found], [x.numpy() for x in expected])


def test_a_graph_without_breaks_gives_the_same_bits():
    *inputs, dout = tensors(*oracle.ATTENTION["rows of different segments"])
    compiled = torch.compile(native.attention, backend="aot_eager", fullgraph=True)
    results = [(out, *torch.autograd.grad(out, inputs[:3], dout)) for out in (native.attention(*inputs), compiled(*inputs))]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_is_linear_in_the_length():
    """Nothing that is kept for the backward pass is larger than the queries, though S x S is."""
    q, k, v, segments, _ = tensors(*oracle.attention_case(1, 2, 1, 400, 400, 8, oracle.packed(200, 200)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        native.attention(q, k, v, segments)
    assert kept and max(kept) <= q.numel() < 400 * 400


def test_a_wrong_dtype_is_named():
    q, k, v, segments, _ = tensors(*oracle.ATTENTION["rows of different segments"])
    with pytest.raises(ValueError, match="q_BHSD is bfloat16"):
        native.attention(q.bfloat16(), k, v, segments)
    with pytest.raises(ValueError, match="segments_BS is int64"):
        native.attention(q, k, v, segments.long())
    with pytest.raises(ValueError, match="features_BHWC is float64"):
        native.roi_align(torch.zeros(1, 2, 2, 3).double(), torch.zeros(1, 1, 4), 2)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(core, "NAME", "absent.so")
    with pytest.raises(ValueError, match=r"python -m granvit\.native"):
        native.attention(*tensors(*oracle.ATTENTION["one query"][:4]))
