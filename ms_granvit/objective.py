"""The caption term of the loss (paper section 4.1: L_caption = CrossEntropy(O_LLM, T)); a sum, which the engine divides."""
import mindspore as ms
from mindspore import Tensor, ops


def caption_sum(logits_BAV: Tensor, targets_BA: Tensor, weights_BA: Tensor) -> Tensor:
    """Summed cross-entropy of the supervised tokens, in float32."""
    logits = ops.log_softmax(ops.cast(logits_BAV, ms.float32), -1)
    chosen = ops.gather_elements(logits, 2, ops.expand_dims(targets_BA, -1)).squeeze(-1)
    return -ops.sum(chosen * weights_BA)
