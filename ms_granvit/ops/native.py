"""ROIAlign and attention by the C++ kernels (`granvit.native`): float32 on CPU, through `ops.Custom` with `func_type="aot"`.

The same functions run in the static graph and in PyNative; shapes must be static. The operators are made when this module is
imported, because a static graph cannot make them: import it after the device is set.
Layout letters: B images or rows, K boxes, H x W feature cells, C width, g output cells along a side; H query heads, G key-value
heads, S queries, L keys, D head width.
"""
import mindspore as ms
from mindspore import Tensor, ops

from granvit import native

DEVICE = ms.get_context("device_target")
# On an NPU ops.Custom would look for an operator of CANN.
MISSING = native.why_missing() or f"the C++ kernels run on CPU; the device was {DEVICE} when ms_granvit.ops.native was imported"


def custom(name: str, shape, dtype, bprop=None):
    """The operator `name` of the library, or None if there is no library or the device is another one."""
    path = native.library()
    return ops.Custom(f"{path}:{name}", shape, dtype, "aot", bprop=bprop) if path and DEVICE == "CPU" else None


# `out_like_g` is an array of g numbers: a custom operator knows only the shapes of its arrays.
def roi_align_shape(features, boxes, out_like_g):
    return native.check_roi_align(features, boxes, out_like_g[0])


def roi_align_dtype(features, boxes, out_like_g):
    native.check_dtypes("float32", features_BHWC=features, boxes_BK4=boxes)
    return features


ROI_ALIGN_GRAD = custom("GranvitRoiAlignGrad", lambda dout, boxes, features: features, lambda dout, boxes, features: features)


def roi_align_bprop(features_BHWC, boxes_BK4, out_like_g, out, dout):
    return ROI_ALIGN_GRAD(dout, boxes_BK4, features_BHWC), ops.zeros_like(boxes_BK4), ops.zeros_like(out_like_g)


ROI_ALIGN = custom("GranvitRoiAlign", roi_align_shape, roi_align_dtype, roi_align_bprop)


def attention_shape(q, k, v, segments=None):
    native.check_attention(q, k, v, segments)
    return q, q[:3]


def attention_dtype(q, k, v, segments=None):
    native.check_dtypes("float32", q_BHSD=q, k_BGLD=k, v_BGLD=v)
    if segments is not None:
        native.check_dtypes("int32", segments_BS=segments)
    return q, q


def first_three(q, k, v, *rest):
    return q, k, v


ATTENTION_GRAD = custom("GranvitAttentionGrad", first_three, first_three)


def attention_bprop(q_BHSD, k_BGLD, v_BGLD, outputs, gradients):
    return ATTENTION_GRAD(q_BHSD, k_BGLD, v_BGLD, outputs[0], outputs[1], gradients[0])


def masked_attention_bprop(q_BHSD, k_BGLD, v_BGLD, segments_BS, outputs, gradients):
    dq, dk, dv = ATTENTION_GRAD(q_BHSD, k_BGLD, v_BGLD, segments_BS, outputs[0], outputs[1], gradients[0])
    return dq, dk, dv, ops.zeros_like(segments_BS)


ATTENTION = custom("GranvitAttention", attention_shape, attention_dtype, attention_bprop)
MASKED_ATTENTION = custom("GranvitMaskedAttention", attention_shape, attention_dtype, masked_attention_bprop)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`; boxes are xyxy in 0..1 of the feature map. The mathematics is that of
    `ms_granvit.ops.roi_align.roi_align`; boxes get a gradient of zero. A box with NaN has NaN features.

    float32 on CPU. Raises ValueError that names the argument, or says how to get the kernels if they are not built.
    """
    if ROI_ALIGN is None:
        raise ValueError(MISSING)
    return ROI_ALIGN(features_BHWC, boxes_BK4, ops.zeros((grid,), ms.float32))


def attention(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, segments_BS: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`; query head h uses key head h // (H / G).

    With `segments_BS` (int32) query i sees key j if j <= i and the key's segment is 0 or i's own; without, it sees all keys. What
    is kept for the backward pass are the arguments, the output and one number for each query.

    float32 on CPU. Raises ValueError that names the argument, or says how to get the kernels if they are not built.
    """
    if ATTENTION is None:
        raise ValueError(MISSING)
    if segments_BS is None:
        return ATTENTION(q_BHSD, k_BGLD, v_BGLD)[0]
    return MASKED_ATTENTION(q_BHSD, k_BGLD, v_BGLD, segments_BS)[0]


def segments(segments_BS: Tensor) -> Tensor:
    """What `attention` takes as its mask."""
    return segments_BS
