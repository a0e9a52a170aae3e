"""The stand-ins of torch_npu's fused operators compute what the documentation says; `pt_granvit`'s calls of them are right."""
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parity.documented import torch_npu  # noqa: E402
from pt_granvit.ops.table import kernels_for  # noqa: E402
from tests.ascend import oracle  # noqa: E402
from tests.ascend.oracle import ROUNDED, SEGMENTS  # noqa: E402

SCALE = 0.2
TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)


@pytest.fixture
def installed():
    with torch_npu.installed():
        yield sys.modules["torch_npu"]


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(a)).requires_grad_() for a in arrays]


def compare(out, inputs, cotangent, expected):
    expected_out, expected_gradients = expected
    np.testing.assert_allclose(out.detach().numpy(), expected_out, **ROUNDED)
    gradients = torch.autograd.grad(out, inputs, torch.from_numpy(cotangent))
    for which, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        np.testing.assert_allclose(gradient.numpy(), wanted, **ROUNDED, err_msg=f"gradient {which}")


def test_attention_with_the_shared_prefix_mask_and_grouped_keys(installed):
    q, k, v, cotangent = oracle.inputs(24)
    discarded, inputs = oracle.shared_prefix(SEGMENTS), tensors(q, k, v)
    out = installed.npu_fusion_attention(*inputs, 4, "BNSD", atten_mask=torch.from_numpy(discarded), scale=SCALE)[0]
    compare(out, inputs, cotangent, oracle.attention(q, k, v, discarded, SCALE, cotangent))
    assert installed.calls[0].shapes["key"] == k.shape and installed.calls[0].dtypes["atten_mask"] == "bool"


def test_the_softmax_of_two_calls_can_be_merged(installed):
    """The second and third output are the largest score and the sum of exponentials: with them the attention over two halves of
    the keys gives the attention over all."""
    q, k, v, _ = oracle.inputs(16, (2, 2, 2))
    expected, _ = oracle.attention(q, k, v, False, SCALE, q)
    parts = []
    for keys in (slice(0, 7), slice(7, None)):
        inputs = [torch.from_numpy(x.astype(np.float32)) for x in (q, k[:, :, keys], v[:, :, keys])]
        out, largest, total, *_ = installed.npu_fusion_attention(*inputs, 2, "BNSD", scale=SCALE)
        assert largest.shape == total.shape == (*q.shape[:3], 8) and largest.dtype == total.dtype == torch.float32
        parts.append((out, largest[..., :1], total[..., :1]))
    top = torch.maximum(parts[0][1], parts[1][1])
    weights = [total * torch.exp(largest - top) for _, largest, total in parts]
    merged = sum(w * out for w, (out, *_) in zip(weights, parts, strict=True)) / sum(weights)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND"])
def test_layouts(installed, layout):
    q, k, v, cotangent = oracle.inputs(16)
    expected, _ = oracle.attention(q, k, v, False, SCALE, cotangent)
    axes = {"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3)}[layout]
    arranged = tensors(*(x.transpose(axes) for x in (q, k, v)))
    if layout != "BSND":
        arranged = [x.flatten(2) for x in arranged]
    out = installed.npu_fusion_attention(*arranged, 4, layout, scale=SCALE)[0]
    np.testing.assert_allclose(out.detach().numpy(), expected.transpose(axes).reshape(out.shape), **ROUNDED)


@pytest.mark.parametrize(("arguments", "kept"), [
    ({"next_tockens": 0, "atten_mask": torch.zeros(9, 14, dtype=torch.bool)}, lambda i, j: j <= i),
    ({"sparse_mode": 2, "atten_mask": TRIANGLE}, lambda i, j: j <= i),
    ({"sparse_mode": 3, "atten_mask": TRIANGLE}, lambda i, j: j <= i + 5),
    ({"sparse_mode": 4, "atten_mask": TRIANGLE, "pre_tockens": 4, "next_tockens": 1}, lambda i, j: (j <= i + 6) & (j >= i + 1)),
])  # fmt: skip
def test_sparse_modes(installed, arguments, kept):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, n, 16)).astype(np.float16) for n in (9, 14, 14))
    expected, _ = oracle.attention(q, k, v, ~kept(np.arange(9)[:, None], np.arange(14)), SCALE, q)
    out = installed.npu_fusion_attention(*tensors(q, k, v), 2, "BNSD", scale=SCALE, **arguments)[0]
    np.testing.assert_allclose(out.detach().numpy(), expected, **ROUNDED)


@pytest.mark.parametrize("mode", [0, 2, 3])  # 0: all keys of the own sequence
def test_several_sequences_in_one_row(installed, mode):
    rng, ends_q, ends_kv = np.random.default_rng(0), (4, 9, 11), (6, 11, 16)
    q, k, v = (rng.standard_normal((n, 2, 16)).astype(np.float16) for n in (11, 16, 16))
    arguments = {"atten_mask": TRIANGLE if mode else None, "sparse_mode": mode, "scale": SCALE}
    out, largest, *_ = installed.npu_fusion_attention(*tensors(q, k, v), 2, "TND", actual_seq_qlen=ends_q,
                                                      actual_seq_kvlen=ends_kv, **arguments)  # fmt: skip
    assert largest.shape == (2, 11, 8)
    for q0, q1, k0, k1 in zip((0, *ends_q[:-1]), ends_q, (0, *ends_kv[:-1]), ends_kv, strict=True):
        S, L = q1 - q0, k1 - k0
        kept = np.arange(L) <= np.arange(S)[:, None] + {0: L, 2: 0, 3: L - S}[mode]
        parts = [x.transpose(1, 0, 2)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        expected, _ = oracle.attention(*parts, ~kept, SCALE, parts[0])
        np.testing.assert_allclose(out[q0:q1].detach().numpy(), expected[0].transpose(1, 0, 2), **ROUNDED)


def fusion(width):
    """pt_granvit's attention as an engine on an NPU picks it: its mask of segments, and itself."""
    return kernels_for("npu", torch.float16, {"attention": "npu_fusion"}).attention(head_dim=width, masked=True, cached=False)


@pytest.mark.parametrize("width", [72, 16])  # 72 is padded to 80
def test_npu_fusion_follows_the_definition_through_the_stand_in(installed, width):
    q, k, v, cotangent = oracle.inputs(width)
    inputs, (mask_of, attend) = tensors(q, k, v), fusion(width)
    out = attend(*inputs, mask_of(torch.from_numpy(SEGMENTS)))
    compare(out, inputs, cotangent, oracle.attention(q, k, v, oracle.shared_prefix(SEGMENTS), width**-0.5, cotangent))
    assert installed.calls[0].shapes["query"][-1] == width + -width % 16
    assert installed.calls[0].shapes["key"][1] == 2  # keys are not repeated


@pytest.mark.parametrize("S", [1, 5])
def test_npu_fusion_with_the_mask_of_caches_sees_keys_beyond_its_own_number(installed, S):
    """Generation: S new tokens, after which slots of the caches are still empty. The keys before them are in slots above S."""
    q, k, v, cotangent = oracle.inputs(16)
    L, positions = k.shape[2], 6 + np.arange(S)
    mask = np.broadcast_to(np.arange(L) <= positions[:, None], (2, 1, S, L))
    _, attend = fusion(16)
    inputs = tensors(np.ascontiguousarray(q[:, :, :S]), k, v)
    expected = oracle.attention(q[:, :, :S], k, v, ~mask, 0.25, cotangent[:, :, :S])
    compare(attend(*inputs, torch.from_numpy(mask.copy())), inputs, np.ascontiguousarray(cotangent[:, :, :S]), expected)


def test_an_inverted_mask_in_npu_fusion_is_noticed(installed, monkeypatch):
    q, k, v, cotangent = oracle.inputs(16)
    (mask_of, attend), documented = fusion(16), installed.npu_fusion_attention

    def inverted(*tensors, atten_mask, **others):
        return documented(*tensors, atten_mask=~atten_mask, **others)

    monkeypatch.setattr(installed, "npu_fusion_attention", inverted)
    out = attend(*tensors(q, k, v), mask_of(torch.from_numpy(SEGMENTS))).detach().numpy()
    expected, _ = oracle.attention(q, k, v, oracle.shared_prefix(SEGMENTS), 0.25, cotangent)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(out, expected, **ROUNDED)


def rotated(x, half):
    if half:
        first, second = np.split(x, 2, -1)
        return np.concatenate((-second, first), -1)
    return np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)


def test_small_operators(installed):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 3, 4)).astype(np.float16), rng.standard_normal(4).astype(np.float16)
    root = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.01)
    y, reciprocal = installed.npu_rms_norm(torch.from_numpy(x), torch.from_numpy(g), epsilon=0.01)
    np.testing.assert_allclose(y.numpy(), x / root * g, **ROUNDED)
    np.testing.assert_allclose(reciprocal.numpy(), 1 / root, rtol=1e-6)

    a, b = np.split(x.astype(np.float64), 2, -1)
    np.testing.assert_allclose(installed.npu_swiglu(torch.from_numpy(x)).numpy(), a / (1 + np.exp(-a)) * b, **ROUNDED)

    heads = rng.standard_normal((2, 2, 3, 4)).astype(np.float16)
    cos, sin = (f(rng.uniform(0, 6, (1, 1, 3, 4))).astype(np.float16) for f in (np.cos, np.sin))
    for mode in ("half", "interleave"):
        out = installed.npu_rotary_mul(*map(torch.from_numpy, (heads, cos, sin)), rotary_mode=mode)
        wide = heads.astype(np.float64)
        np.testing.assert_allclose(out.numpy(), wide * cos + rotated(wide, mode == "half") * sin, **ROUNDED)


def halves_rotated(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


GRADIENTS = {
    "npu_rms_norm": (((3, 4), (4,)), lambda x, g: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * g),
    "npu_rotary_mul": (((1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)), lambda x, c, s: x * c + halves_rotated(x) * s),
    "npu_swiglu": (((3, 4),), lambda x: torch.nn.functional.silu(x[..., :2]) * x[..., 2:]),
}


@pytest.mark.parametrize("operator", GRADIENTS)
def test_small_operators_are_differentiable(installed, operator):
    shapes, definition = GRADIENTS[operator]
    wide = [torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for shape in shapes]
    gradients = []
    for call, dtype in ((getattr(installed, operator), torch.float32), (definition, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in wide]
        out = call(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        gradients.append(torch.autograd.grad((out * torch.arange(out.numel()).reshape(out.shape)).sum(), inputs))
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_installed_ends():
    assert "torch_npu" not in sys.modules
