"""Hand-written operators of the PyTorch package against their definitions in float64."""
import pytest

torch = pytest.importorskip("torch")

from pt_granvit.ops import adamw, attention, cross_entropy  # noqa: E402


@pytest.mark.parametrize("trained_head", [True, False])
def test_chunks_of_the_cross_entropy_add_up_to_the_whole(monkeypatch, trained_head):
    monkeypatch.setattr(cross_entropy, "CHUNK", 31)  # a chunk is then one position, but for the limit of 16 chunks: 2 positions
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (19, 31))
    targets, weights = torch.randint(0, 31, (19,), generator=generator), torch.rand(19, generator=generator)
    assert cross_entropy.rows_in_chunk(19, 31) == 2
    found = []
    for function in (cross_entropy.composed, cross_entropy.chunked):
        inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_(trained_head)]
        total = 3 * function(*inputs, targets, weights)
        total.backward()
        found.append((total.detach(), inputs[0].grad, inputs[1].grad))
    assert (found[1][2] is None) == (not trained_head)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_adamw_in_chunks_follows_the_formula(monkeypatch):
    monkeypatch.setitem(adamw.CHUNK, "cpu", 4)
    generator = torch.Generator().manual_seed(0)
    p, g, m, v = (torch.rand(11, generator=generator, dtype=torch.float64) for _ in range(4))
    m_new, v_new = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    expected = 0.97 * p - 0.2 * m_new / ((v_new / 0.3).sqrt() + 1e-8)
    adamw.composed(p, g, m, v, 0.97, 0.2, 0.3, 0.9, 0.99, 1e-8)
    for found, value in ((p, expected), (m, m_new), (v, v_new)):
        torch.testing.assert_close(found, value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("attend", [attention.composed, attention.sdpa])
def test_float16_scores_that_overflow_only_before_they_are_scaled(attend):
    """Products of 102,400, which float16 does not hold, and scores of 12,800."""
    q, k = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16), torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)
    v = torch.arange(3, dtype=torch.float16).reshape(1, 1, 3, 1).expand(1, 1, 3, 64)
    torch.testing.assert_close(attend(q, k, v, None), torch.ones_like(v))
