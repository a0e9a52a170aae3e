"""ROIAlign and attention by the C++ kernels (`granvit.native`): float32 on CPU, as custom operators of PyTorch.

Registered gradients and fake implementations let `torch.compile` take them without a break. The kernels release Python's lock.
Layout letters: B images or rows, K boxes, H x W feature cells, C width, g output cells along a side; H query heads, G key-value
heads, S queries, L keys, D head width.
"""
import torch
from torch import Tensor

from granvit import native


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`; boxes are xyxy in 0..1 of the feature map. The mathematics is that of
    `pt_granvit.ops.roi_align.roi_align`; boxes get no gradient. A box with NaN has NaN features.

    float32 on CPU. Raises ValueError that names the argument, or says how to get the kernels if they are not built.
    """
    return torch.ops.granvit.roi_align(features_BHWC, boxes_BK4, grid)


def attention(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, segments_BS: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`; query head h uses key head h // (H / G).

    With `segments_BS` (int32) query i sees key j if j <= i and the key's segment is 0 or i's own; without, it sees all keys. What
    is kept for the backward pass are the arguments, the output and one number for each query.

    float32 on CPU. Raises ValueError that names the argument, or says how to get the kernels if they are not built.
    """
    return torch.ops.granvit.attention(q_BHSD, k_BGLD, v_BGLD, segments_BS)[0]


def call(name: str, arrays: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    native.call(name, [None if array is None else array.data_ptr() for array in arrays], sizes)


def roi_align_shape(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> tuple[int, ...]:
    native.check_dtypes("float32", features_BHWC=features_BHWC.dtype, boxes_BK4=boxes_BK4.dtype)
    return native.check_roi_align(features_BHWC.shape, boxes_BK4.shape, grid)


def attention_sizes(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, segments_BS: Tensor | None) -> tuple[int, ...]:
    native.check_dtypes("float32", q_BHSD=q_BHSD.dtype, k_BGLD=k_BGLD.dtype, v_BGLD=v_BGLD.dtype)
    if segments_BS is not None:
        native.check_dtypes("int32", segments_BS=segments_BS.dtype)
    return native.check_attention(q_BHSD.shape, k_BGLD.shape, v_BGLD.shape, None if segments_BS is None else segments_BS.shape)


@torch.library.custom_op("granvit::roi_align", mutates_args=(), device_types="cpu")
def roi_align_op(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    out = features_BHWC.new_empty(roi_align_shape(features_BHWC, boxes_BK4, grid))
    sizes = (*out.shape[:2], *features_BHWC.shape[1:], grid)
    features_BHWC, boxes_BK4 = features_BHWC.contiguous(), boxes_BK4.contiguous()
    call("granvit_roi_align_forward", (features_BHWC, boxes_BK4, out), sizes)
    return out


@roi_align_op.register_fake
def _(features_BHWC, boxes_BK4, grid):
    return features_BHWC.new_empty(roi_align_shape(features_BHWC, boxes_BK4, grid))


@torch.library.custom_op("granvit::roi_align_grad", mutates_args=(), device_types="cpu")
def roi_align_grad(dout_BKggC: Tensor, boxes_BK4: Tensor, H: int, W: int) -> Tensor:
    B, K, grid, _, C = dout_BKggC.shape
    dfeatures_BHWC = dout_BKggC.new_empty((B, H, W, C))
    dout_BKggC, boxes_BK4 = dout_BKggC.contiguous(), boxes_BK4.contiguous()
    call("granvit_roi_align_backward", (dout_BKggC, boxes_BK4, dfeatures_BHWC), (B, K, H, W, C, grid))
    return dfeatures_BHWC


@roi_align_grad.register_fake
def _(dout_BKggC, boxes_BK4, H, W):
    return dout_BKggC.new_empty((dout_BKggC.shape[0], H, W, dout_BKggC.shape[-1]))


def keep_boxes(ctx, inputs, output):
    features_BHWC, boxes_BK4, _ = inputs
    ctx.save_for_backward(boxes_BK4)
    ctx.cells = features_BHWC.shape[1:3]


def roi_align_backward(ctx, dout_BKggC):
    return torch.ops.granvit.roi_align_grad(dout_BKggC, *ctx.saved_tensors, *ctx.cells), None, None


roi_align_op.register_autograd(roi_align_backward, setup_context=keep_boxes)


@torch.library.custom_op("granvit::attention", mutates_args=(), device_types="cpu")
def attention_op(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, segments_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of the sum of exponentials of each query's scores, `[B, H, S]`."""
    sizes = attention_sizes(q_BHSD, k_BGLD, v_BGLD, segments_BS)
    out, lse_BHS = q_BHSD.new_empty(q_BHSD.shape), q_BHSD.new_empty(q_BHSD.shape[:-1])
    inputs = [None if x is None else x.contiguous() for x in (q_BHSD, k_BGLD, v_BGLD, segments_BS)]
    call("granvit_attention_forward", (*inputs, out, lse_BHS), sizes)
    return out, lse_BHS


@attention_op.register_fake
def _(q_BHSD, k_BGLD, v_BGLD, segments_BS):
    attention_sizes(q_BHSD, k_BGLD, v_BGLD, segments_BS)
    return q_BHSD.new_empty(q_BHSD.shape), q_BHSD.new_empty(q_BHSD.shape[:-1])


@torch.library.custom_op("granvit::attention_grad", mutates_args=(), device_types="cpu")
def attention_grad(
    q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, segments_BS: Tensor | None, out: Tensor, lse_BHS: Tensor, dout: Tensor,
    dlse_BHS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = attention_sizes(q_BHSD, k_BGLD, v_BGLD, segments_BS)
    arrays = (q_BHSD, k_BGLD, v_BGLD, segments_BS, out, lse_BHS, dout, dlse_BHS)
    inputs = [None if x is None else x.contiguous() for x in arrays]
    gradients = tuple(x.new_empty(x.shape) for x in (q_BHSD, k_BGLD, v_BGLD))
    call("granvit_attention_backward", (*inputs, *gradients), sizes)
    return gradients


@attention_grad.register_fake
def _(q_BHSD, k_BGLD, v_BGLD, segments_BS, out, lse_BHS, dout, dlse_BHS):
    return tuple(x.new_empty(x.shape) for x in (q_BHSD, k_BGLD, v_BGLD))


def keep_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def attention_backward(ctx, dout, dlse_BHS):
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[4])
    return *torch.ops.granvit.attention_grad(*ctx.saved_tensors, dout, dlse_BHS), None


attention_op.register_autograd(attention_backward, setup_context=keep_attention)


def segments(segments_BS: Tensor) -> Tensor:
    """What `attention` takes as its mask."""
    return segments_BS.int()
