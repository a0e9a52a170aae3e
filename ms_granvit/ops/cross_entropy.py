"""The summed cross-entropy of supervised positions, from their hidden states and the weights of the decoder's head.

Layout letters: A positions, C width, V vocabulary.
"""
import mindspore as ms
from mindspore import Tensor, nn, ops

CHUNK = 1 << 24  # logits in a chunk (64 MB in float32), unless that would make more than
MOST_CHUNKS = 16  # chunks: each is compiled


def composed(hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
    """`sum(weights * cross-entropy(hidden head^T, targets))`, a float32 scalar; all logits exist at once, in float32."""
    logits = ops.log_softmax(ops.cast(ops.matmul(hidden_AC, ops.cast(head_VC, hidden_AC.dtype).T), ms.float32), -1)
    return -ops.sum(ops.gather_elements(logits, 1, ops.expand_dims(targets_A, -1)).squeeze(-1) * weights_A)


def rows_in_chunk(rows: int, vocab: int) -> int:
    """Positions whose logits are computed at a time."""
    by_size, by_number = CHUNK // vocab, -(-rows // MOST_CHUNKS)
    return by_size if by_size > by_number else by_number


class Chunked(nn.Cell):
    """`composed`, a chunk of positions at a time. The backward pass computes the logits of a chunk again, which costs one more
    product with the head; logits exist for one chunk only. A trained head's gradient is summed in float32.

    With P the probabilities, the gradient of the logits is weights * (P - one-hot(targets)).
    """

    def __init__(self):
        super().__init__()
        self.nn, self.nt, self.tn = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)
        # Operators, not functions: MindSpore loses the graphs of some functions (`max`, `ops.softmax`) inside a `bprop`.
        self.softmax, self.one_hot, self.depend = ops.Softmax(-1), ops.OneHot(), ops.Depend()
        self.one, self.zero = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
        A, V = hidden_AC.shape[0], head_VC.shape[0]
        step, head, total = rows_in_chunk(A, V), ops.cast(head_VC, hidden_AC.dtype), ops.zeros((), ms.float32)
        for start in range(0, A, step):
            stop = start + step
            logits = ops.log_softmax(ops.cast(self.nt(hidden_AC[start:stop], head), ms.float32), -1)
            chosen = ops.gather_elements(logits, 1, ops.expand_dims(targets_A[start:stop], -1)).squeeze(-1)
            total = total - ops.sum(chosen * weights_A[start:stop])
        return total

    def bprop(self, hidden_AC, head_VC, targets_A, weights_A, out, dout):
        # Without this the compiler would keep the forward pass's logits for the same products here.
        hidden_AC = self.depend(hidden_AC, out)
        A, V = hidden_AC.shape[0], head_VC.shape[0]
        step, head = rows_in_chunk(A, V), ops.cast(head_VC, hidden_AC.dtype)
        dhidden, dhead = (), ops.zeros(head_VC.shape, ms.float32)
        for start in range(0, A, step):
            stop = start + step
            hidden = hidden_AC[start:stop]
            p = self.softmax(ops.cast(self.nt(hidden, head), ms.float32))
            one_hot = self.one_hot(targets_A[start:stop], V, self.one, self.zero)
            dlogits = ops.cast((p - one_hot) * ops.expand_dims(weights_A[start:stop] * dout, -1), hidden.dtype)
            dhidden += (self.nn(dlogits, head),)
            dhead = dhead + ops.cast(self.tn(dlogits, hidden), ms.float32)
        return ops.cat(dhidden), ops.cast(dhead, head_VC.dtype), ops.zeros_like(targets_A), ops.zeros_like(weights_A)


CHUNKED = Chunked()


def chunked(hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor) -> Tensor:
    """`Chunked`."""
    return CHUNKED(hidden_AC, head_VC, targets_A, weights_A)
