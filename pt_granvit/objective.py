"""The caption term of the loss (paper section 4.1: L_caption = CrossEntropy(O_LLM, T)); a sum, which the engine divides."""
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider


def caption_sum(logits_BAV: Tensor, targets_BA: Tensor, weights_BA: Tensor) -> Tensor:
    """Summed cross-entropy of the supervised tokens, in float32."""
    logits = to_float32_or_wider(logits_BAV)
    chosen = logits.gather(-1, targets_BA[..., None])[..., 0]
    return ((logits.logsumexp(-1) - chosen) * weights_BA.to(logits.dtype)).sum()
