"""Every call of attention that a shipped configuration makes on Ascend obeys the documented rules.

The packages' own functions make the calls; nothing is computed. In MindSpore the tensors are real, so one row is passed, and the
rules get the true number of rows. In PyTorch they are meta tensors.
"""
import inspect

import pytest

from parity.documented import Attention, Given
from tests.ascend.shipped import attention_calls


def padded(width):
    return width + -width % 16


def of_rows(tensor, B):
    """A tensor of one row, as the rules would see it with B rows; one without an axis of rows as it is."""
    shape = (B, *tensor.shape[1:]) if tensor.ndim == 4 else tensor.shape
    return Given(shape, str(tensor.dtype).lower())


def test_shipped_calls_reach_the_cases_that_matter():
    calls = attention_calls()
    names = " ".join(calls.values())
    for word in ("stage1.yaml: teacher", "generation", "decoder, 3072 tokens", "llama-3-8b"):
        assert word in names
    assert {call.D for call in calls} >= {72, 64, 128}
    assert {7, 8} <= {call.B for call in calls if call.D == 72}  # 7: the views of a tiled image


def test_mindspore(monkeypatch):
    ms = pytest.importorskip("mindspore")
    from mindspore import ops

    from ms_granvit.ops.table import kernels_for
    from parity.documented import mindspore_ascend

    made = []
    signature = inspect.signature(mindspore_ascend.flash_attention_score)

    def noted(query, *others, **named):
        made.append(signature.bind(query, *others, **named).arguments)
        return query

    monkeypatch.setattr(ops, "flash_attention_score", noted)
    kernels = kernels_for("npu", ms.bfloat16, {"attention": "flash"})
    for call, name in attention_calls().items():
        q = ops.zeros((1, call.H, call.S, call.D), ms.float16)  # CPU slices no bfloat16
        kv = ops.zeros((1, call.G, call.L, call.D), ms.float16)
        mask_of, attend = kernels.attention(head_dim=call.D, masked=call.masked, cached=call.cached)
        mask = ops.zeros((1, 1, call.S, call.L), ms.bool_) if call.masked else None
        if call.masked and not call.cached:  # a mask of the package's own would take seconds at these lengths
            own = mask_of(ops.zeros((1, 8), ms.int32))
            assert own.shape == (1, 1, 8, 8) and own.dtype == mask.dtype
        assert attend(q, kv, kv, mask).shape == q.shape, name
        arguments = made.pop()
        assert arguments.pop("scalar_value") == call.D**-0.5, name
        given = {key: of_rows(value, call.B) if isinstance(value, ms.Tensor) else value for key, value in arguments.items()}
        g = mindspore_ascend.ATTENTION.validate(Attention(**given))
        assert g == (call.B, call.H, call.G, call.S, call.L, padded(call.D), padded(call.D)), name
        assert not made


def test_torch():
    torch = pytest.importorskip("torch")

    from parity.documented import torch_npu
    from pt_granvit.ops.table import kernels_for

    kernels = kernels_for("npu", torch.bfloat16, {"attention": "npu_fusion"})
    with torch_npu.installed() as made, torch.device("meta"):
        for call, name in attention_calls().items():
            q, kv = (torch.zeros(call.B, heads, length, call.D, dtype=torch.bfloat16)
                     for heads, length in ((call.H, call.S), (call.G, call.L)))  # fmt: skip
            mask_of, attend = kernels.attention(head_dim=call.D, masked=call.masked, cached=call.cached)
            mask = torch.zeros(call.B, 1, call.S, call.L, dtype=torch.bool) if call.masked else None
            if call.masked and not call.cached:
                mask = mask_of(torch.zeros(call.B, call.S, dtype=torch.int32))
            out = attend(q, kv, kv, mask)
            assert out.shape == q.shape and out.dtype == q.dtype, name
            last = made[-1]
            assert last.shapes["query"] == (call.B, call.H, call.S, padded(call.D)) and last.shapes["key"][1] == call.G, name
            assert last.arguments["scale"] == call.D**-0.5, name
    assert len(made) == len(attention_calls())
