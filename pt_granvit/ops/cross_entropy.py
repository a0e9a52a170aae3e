"""The summed cross-entropy of supervised positions, from their hidden states and the weights of the decoder's head.

Layout letters: A positions, C width, V vocabulary.
"""
import torch
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider

CHUNK = 1 << 24  # logits in a chunk (64 MB in float32), unless that would make more than
MOST_CHUNKS = 16  # chunks: the MindSpore twin compiles each


def composed(hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
    """`sum(weights * cross-entropy(hidden head^T, targets))`, a scalar in float32 (float64 for float64 hidden states); all logits
    exist at once, in float32."""
    logits = to_float32_or_wider(hidden_AC @ head_VC.to(hidden_AC.dtype).T)
    chosen = logits.gather(1, targets_A[:, None])[:, 0]
    return ((logits.logsumexp(1) - chosen) * weights_A.to(logits.dtype)).sum()


def rows_in_chunk(rows: int, vocab: int) -> int:
    """Positions whose logits are computed at a time."""
    return max(CHUNK // vocab, -(-rows // MOST_CHUNKS))


class Chunked(torch.autograd.Function):
    """`composed`, a chunk of positions at a time. The backward pass computes the logits of a chunk again, which costs one more
    product with the head; logits exist for one chunk only. A trained head's gradient is summed in the head's dtype.

    With P the probabilities, the gradient of the logits is weights * (P - one-hot(targets)).
    """

    @staticmethod
    def forward(ctx, hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_AC, head_VC, targets_A, weights_A)
        step, head = rows_in_chunk(len(hidden_AC), len(head_VC)), head_VC.to(hidden_AC.dtype)
        chunks = zip(hidden_AC.split(step), targets_A.split(step), weights_A.split(step), strict=True)
        return torch.stack([composed(hidden, head, targets, weights) for hidden, targets, weights in chunks]).sum()

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_AC, head_VC, targets_A, weights_A = ctx.saved_tensors
        step, head = rows_in_chunk(len(hidden_AC), len(head_VC)), head_VC.to(hidden_AC.dtype)
        dhidden_AC = torch.empty_like(hidden_AC)
        dhead_VC = torch.zeros_like(head_VC) if ctx.needs_input_grad[1] else None
        chunks = (x.split(step) for x in (hidden_AC, dhidden_AC, targets_A, weights_A))
        for hidden, dhidden, targets, weights in zip(*chunks, strict=True):
            p = to_float32_or_wider(hidden @ head.T).softmax(1)
            p.scatter_add_(1, targets[:, None], torch.full_like(p[:, :1], -1.0))
            dlogits = p.mul_((weights.to(p.dtype) * dout)[:, None]).to(hidden.dtype)
            dhidden.copy_(dlogits @ head)
            if dhead_VC is not None:
                dhead_VC += (dlogits.T @ hidden).to(dhead_VC.dtype)
        return dhidden_AC, dhead_VC, None, None


def chunked(hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
    """`Chunked`."""
    return Chunked.apply(hidden_AC, head_VC, targets_A, weights_A)
