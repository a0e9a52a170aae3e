"""FlexAttention with the block mask made from segments: values and gradients against float64 numpy, blocks, compilations.

PyTorch 2.13 refuses gradients of FlexAttention on CPU (`_validate_device`), although its uncompiled form has them. The tests of
gradients remove that check. The compiled form has no backward pass on CPU; on CUDA nothing was run.
"""
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn.attention import flex_attention as torch_flex  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pt_granvit.ops import flex  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

HAS_CPU_KERNELS = shutil.which("g++") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # absolute, values and gradients near 1


def row(length: int, *runs: int) -> list[int]:
    """Segments of a row: `runs` tokens of segment 0, 1, 2, ..., then padding."""
    segments = [s for s, run in enumerate(runs) for _ in range(run)]
    return segments + [-1] * (length - len(segments))


ROWS = {
    "length a multiple of the block": [row(384, 130, 100, 60), row(384, 10, 256)],
    "length no multiple of the block": [row(300, 100, 80, 80), row(300, 1, 150, 149)],
    "all padding after the prefix": [row(300, 140), row(300, 256)],
    "one row": [row(200, 50, 60, 60)],
    "less than a block": [row(40, 10, 10, 12)],
}


def allowed(segments_BS: np.ndarray) -> np.ndarray:
    """The rule for every pair, `[B, S, S]`."""
    query, key = segments_BS[:, :, None], segments_BS[:, None, :]
    return np.tri(segments_BS.shape[1], dtype=bool) & ((key == 0) | (key == query))


def oracle(q, k, v, cotangent, segments_BS):
    """Attention and the gradients of q, k, v, in float64."""
    q, k, v, cotangent = (x.detach().double().numpy() for x in (q, k, v, cotangent))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, pairs in enumerate(allowed(segments_BS)):
        for h in range(q.shape[1]):
            g = h // group
            scores = np.where(pairs, q[b, h] @ k[b, g].T * scale, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, h] = weights @ v[b, g]
            d_weights = cotangent[b, h] @ v[b, g].T
            d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale
            dq[b, h] = d_scores @ k[b, g]
            dk[b, g] += d_scores.T @ q[b, h]
            dv[b, g] += weights.T @ cotangent[b, h]
    return out, dq, dk, dv


def inputs(B: int, S: int, D: int, dtype: torch.dtype, heads: int = 4, groups: int = 2, seed: int = 0):
    """q, k, v and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, S, D, generator=generator).to(dtype) for n in (heads, groups, groups, heads)]


@pytest.fixture
def gradients_on_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradients(rows, dtype, gradients_on_cpu):
    segments = np.array(rows)
    q, k, v, cotangent = inputs(*segments.shape, 72, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = flex.attention(q, k, v, flex.block_mask(torch.from_numpy(segments)))
    assert out.dtype == dtype
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]
    for name, value, expected in zip(("out", "dq", "dk", "dv"), found, oracle(q, k, v, cotangent, segments), strict=True):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(value.double() / scale, expected / scale, rtol=0, atol=ROUNDING[dtype], err_msg=name)


def blocks_of(mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial and full blocks `[B, n, n]`, read from the key blocks that each query block lists."""

    def dense(counts_B1n, indices_B1nn):
        found = torch.zeros_like(indices_B1nn, dtype=torch.bool)
        for place in np.ndindex(*counts_B1n.shape):
            found[place][indices_B1nn[place][: counts_B1n[place]].long()] = True
        return found[:, 0]

    return dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)


def classes_of(segments_BS: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial and full blocks from the pairs; pairs beyond the length count as masked."""
    fill = -segments_BS.shape[1] % flex.BLOCK
    pairs = np.pad(allowed(segments_BS), ((0, 0), (0, fill), (0, fill)))
    n = pairs.shape[1] // flex.BLOCK
    counts = pairs.reshape(-1, n, flex.BLOCK, n, flex.BLOCK).sum((2, 4))
    full = counts == flex.BLOCK**2
    return torch.from_numpy((counts > 0) & ~full), torch.from_numpy(full)


LONG_ROWS = {
    "questions shorter and longer than a block": [row(1000, 300, 40, 400, 30, 100), row(1000, 513, 5, 5, 5, 300)],
    "question borders on block borders": [row(896, 128, 256, 384), row(896, 256, 128, 128, 128)],
    "an empty segment": [row(640, 200, 100, 0, 300)],
    "padding": [row(640, 130), row(640, 640)],
}


@pytest.mark.parametrize("rows", [*ROWS.values(), *LONG_ROWS.values()], ids=[*ROWS, *LONG_ROWS])
def test_blocks_are_classified_as_their_pairs_say(rows):
    segments = np.array(rows)
    for found, expected in zip(blocks_of(flex.block_mask(torch.from_numpy(segments))), classes_of(segments), strict=True):
        torch.testing.assert_close(found, expected)


def test_in_rows_of_any_order_no_allowed_pair_is_lost():
    rng = np.random.default_rng(0)
    segments = rng.integers(-1, 4, (20, 6)).repeat(100, axis=1)
    partial, full = blocks_of(flex.block_mask(torch.from_numpy(segments)))
    expected_partial, expected_full = classes_of(segments)
    torch.testing.assert_close(full, expected_full)
    assert not (expected_partial & ~partial).any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_making_the_mask_holds_no_square_of_the_length():
    S = 5000
    segments = torch.tensor([row(S, 1000, 2000, 1500)])
    with Largest() as largest:
        flex.block_mask(segments)
    assert largest.elements <= -(-S // flex.BLOCK) * flex.BLOCK


def test_without_a_mask_flex_attention_is_not_used(monkeypatch):
    monkeypatch.setattr(flex, "flex_attention", None)
    segments = np.array([row(20, 20)] * 2)
    q, k, v, _ = inputs(2, 20, 24, torch.float32)
    out = flex.attention(q[:, :, -1:], k, v, None)  # the last query sees every key under the causal rule too
    expected = oracle(q, k, v, q, segments)[0][:, :, -1:]
    np.testing.assert_allclose(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not HAS_CPU_KERNELS, reason="compiled FlexAttention on CPU needs g++ and AVX2")
def test_compiled_for_cpu_it_reads_the_blocks_and_a_new_batch_compiles_nothing():
    """Unlike the uncompiled form, which evaluates the rule for every pair, the compiled one visits the listed blocks only."""
    compiled = torch.compile(flex.attention, dynamic=False, fullgraph=True)
    q, k, v, cotangent = inputs(2, 300, 72, torch.float32)
    first = np.array(ROWS["length no multiple of the block"])
    compiled(q, k, v, flex.block_mask(torch.from_numpy(first)))
    second = np.array([row(300, 10, 280), row(300, 140)])  # a question over three blocks; padding after the prefix
    with torch.compiler.set_stance("fail_on_recompile"):
        out = compiled(q, k, v, flex.block_mask(torch.from_numpy(second)))
    np.testing.assert_allclose(out.double(), oracle(q, k, v, cotangent, second)[0], rtol=0, atol=1e-5)


def test_a_compiled_step_takes_a_new_mask_without_a_graph_break_and_compiles_once_per_shape(gradients_on_cpu):
    """The mask is made and used inside one compiled function, as in a training step."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, dynamic=False, fullgraph=True)
    def step(q, k, v, segments):
        return flex.attention(q, k, v, flex.block_mask(segments))

    for length, compilations in ((300, 1), (300, 1), (200, 2), (300, 2)):
        segments = np.array([row(length, 20 + len(graphs), 60, 60)] * 2)
        q, k, v, cotangent = inputs(2, length, 72, torch.float32, seed=length)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = step(q, k, v, torch.from_numpy(segments))
        assert len(graphs) == compilations
        dq, *_ = torch.autograd.grad(out, (q, k, v), cotangent)
        expected = oracle(q, k, v, cotangent, segments)
        np.testing.assert_allclose(out.detach().double(), expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(dq.double(), expected[1], rtol=0, atol=1e-5)
