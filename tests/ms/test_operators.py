"""Hand-written operators of the MindSpore package against their definitions in float64: activations, RMS normalisation and
attention with backward passes, the grouping of all-reduces."""
import math

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from ms_granvit import distributed  # noqa: E402
from ms_granvit.layers import activation  # noqa: E402
from ms_granvit.ops import attention as attention_ops  # noqa: E402
from ms_granvit.ops import cross_entropy, rms_norm  # noqa: E402
from ms_granvit.ops.table import PLAIN, kernels_for  # noqa: E402
from tests.ms.ir import compiled, operators  # noqa: E402

B, H, G, S, D = 2, 4, 2, 7, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


DEFINITIONS = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_activations_and_their_slopes_also_where_they_saturate(kind):
    x, function = np.linspace(-12, 12, 2001).astype(np.float32), activation(kind, PLAIN)

    def total(t):
        y = function(t)
        return y.sum(), y

    (_, y), slope = ms.jit(ms.value_and_grad(total, 0, has_aux=True))(ms.Tensor(x))
    wide, h = x.astype(np.float64), 1e-5
    np.testing.assert_allclose(y.asnumpy(), DEFINITIONS[kind](wide), rtol=2e-6, atol=1e-6)
    expected = (DEFINITIONS[kind](wide + h) - DEFINITIONS[kind](wide - h)) / (2 * h)
    np.testing.assert_allclose(slope.asnumpy(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", ["composed", "product"])
def test_rms_normalisation_and_its_own_backward_pass_in_both_ways_of_taking_a_mean(implementation):
    normalise, eps, weight = getattr(rms_norm, implementation), 1e-2, ms.Tensor(np.ones(12, np.float32))
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((2, 3, 12)) for _ in range(2))

    def weighted(t, cotangent):
        y = normalise(t, weight, eps)
        return (y * cotangent).sum(), y

    differentiate = ms.jit(ms.value_and_grad(weighted, 0, has_aux=True))
    (_, y), dx = differentiate(*(ms.Tensor(a.astype(np.float32)) for a in (x, cotangent)))
    definition = lambda a: a / np.sqrt(np.mean(a**2, -1, keepdims=True) + eps)  # noqa: E731
    np.testing.assert_allclose(y.asnumpy(), definition(x), rtol=2e-6, atol=1e-6)
    h, expected = 1e-5, np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = h
        expected[at] = ((definition(x + step) - definition(x - step)) * cotangent).sum() / (2 * h)
    np.testing.assert_allclose(dx.asnumpy(), expected, rtol=2e-6, atol=2e-6)


def reference_attention(q, k, v, mask):
    """The definition, query by query, in float64."""
    out = np.zeros(q.shape)
    for b, h, s in np.ndindex(q.shape[:3]):
        keys, values = k[b, h // (H // G)], v[b, h // (H // G)]
        seen = np.flatnonzero(mask[b, 0, s])
        scores = keys[seen] @ q[b, h, s] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, h, s] = weights @ values[seen] / weights.sum()
    return out


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, heads, S, D)) for heads in (H, G, G))
    segments = np.array([[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, -1, -1]], np.int32)
    mask = attention_ops.shared_prefix_mask(ms.Tensor(segments)).asnumpy()
    return q, k, v, segments, mask


def test_shared_prefix_mask_follows_its_definition(qkv):
    *_, segments, mask = qkv
    for b, i, j in np.ndindex(B, S, S):
        assert mask[b, 0, i, j] == (j <= i and segments[b, j] in (0, segments[b, i]))


def test_composed_attention_and_its_own_backward_pass(qkv):
    q, k, v, _, mask = qkv
    cotangent = np.random.default_rng(1).standard_normal((B, H, S, D))

    def weighted(q, k, v, mask, cotangent):
        out = attention_ops.composed(q, k, v, mask)
        return (out * cotangent).sum(), out

    tensors = [ms.Tensor(x.astype(np.float32)) for x in (q, k, v)]
    run = ms.jit(ms.value_and_grad(weighted, (0, 1, 2), has_aux=True))
    (_, out), gradients = run(*tensors, ms.Tensor(mask), ms.Tensor(cotangent.astype(np.float32)))
    np.testing.assert_allclose(out.asnumpy(), reference_attention(q, k, v, mask), rtol=0, atol=2e-6)

    rng, h = np.random.default_rng(2), 1e-6
    for which, gradient in enumerate(gradients):  # central differences of the definition along random directions
        for _ in range(4):
            direction = rng.standard_normal((q, k, v)[which].shape)
            ends = []
            for sign in (1, -1):
                moved = [q, k, v]
                moved[which] = moved[which] + sign * h * direction
                ends.append((reference_attention(*moved, mask) * cotangent).sum())
            expected = (ends[0] - ends[1]) / (2 * h)
            assert (gradient.asnumpy() * direction).sum() == pytest.approx(expected, rel=1e-4, abs=1e-4), "qkv"[which]


def test_chunks_of_the_cross_entropy_add_up_to_the_whole(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 31)  # a chunk is then one position, but for the limit of 16 chunks: 2 positions
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((19, 6)), rng.standard_normal((31, 6))
    targets, weights = rng.integers(0, 31, 19), rng.random(19)
    assert cross_entropy.rows_in_chunk(19, 31) == 2
    tensors = [ms.Tensor(x.astype(kind)) for x, kind in ((hidden, np.float32), (head, np.float32), (targets, np.int32))]

    def tripled(hidden, head, targets, weights):
        return 3 * cross_entropy.chunked(hidden, head, targets, weights)

    run = ms.jit(ms.value_and_grad(tripled, (0, 1)))
    total, (dhidden, dhead) = run(*tensors, ms.Tensor(weights.astype(np.float32)))
    logits = hidden @ head.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert float(total) == pytest.approx(-3 * (np.log(p[np.arange(19), targets]) * weights).sum(), rel=1e-6)
    dlogits = 3 * weights[:, None] * (p - np.eye(31)[targets])
    np.testing.assert_allclose(dhidden.asnumpy(), dlogits @ head, atol=1e-5)
    np.testing.assert_allclose(dhead.asnumpy(), dlogits.T @ hidden, atol=1e-5)


@pytest.mark.parametrize(("trained", "products"), [(False, 3 + 3 + 3), (True, 3 + 3 + 3 + 3)])
def test_the_backward_pass_computes_the_logits_of_a_chunk_again_and_no_gradient_of_a_frozen_head(monkeypatch, trained, products):
    """Three chunks: logits forward, logits backward, the hidden states' gradient, and the head's where it is trained."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 2 * 31)

    class Loss(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.head = ms.Parameter(ms.Tensor(np.ones((31, 8), np.float32)), requires_grad=trained)

        def construct(self, hidden, targets, weights):
            return cross_entropy.chunked(hidden, self.head, targets, weights)

    class Gradient(ms.nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            loss = Loss()
            self.differentiate = ms.value_and_grad(loss, 0, ms.ParameterTuple(loss.trainable_params()) if trained else None)

        def construct(self, *inputs):
            return self.differentiate(*inputs)

    arrays = np.ones((6, 8), np.float32), np.zeros(6, np.int32), np.ones(6, np.float32)
    assert operators(compiled(Gradient(), *map(ms.Tensor, arrays)), "MatMul") == products


def test_each_device_and_dtype_has_its_attention():
    of = lambda device, dtype: kernels_for(device, dtype).row("attention", head_dim=64, masked=True, cached=False).name  # noqa: E731
    assert of("npu", ms.bfloat16) == "flash"
    assert of("npu", ms.float32) == "composed"  # the fused kernel takes only 16-bit dtypes
    with pytest.raises(ValueError, match="--framework torch"):
        distributed.choose_device("cuda")


def test_all_reduces_join_every_gradient_once_in_bounded_chunks(monkeypatch):
    monkeypatch.setattr(distributed, "CHUNK", 10)
    assert distributed.chunks([4, 4, 4, 25, 1, 9, 1]) == ((0, 1), (2,), (3,), (4, 5), (6,))
