"""Every documented rule of the fused operators is broken once by a call, and the error names the argument.

The rules of attention are tested on descriptions of calls, without tensors; then every argument of the operators themselves, so
that none is left out on the way to the rules.
"""
import importlib

import pytest

from parity.documented import Attention, Given

PACKAGES = {"mindspore": "mindspore_ascend", "torch": "torch_npu"}


@pytest.fixture(params=PACKAGES)
def package(request):
    pytest.importorskip(request.param)
    return request.param


def rules(package):
    return importlib.import_module(f"parity.documented.{PACKAGES[package]}").ATTENTION


def tensor(*shape, dtype="float16"):
    return Given(shape, dtype)


Q, KV, MASK = tensor(2, 4, 8, 32), tensor(2, 2, 12, 32), tensor(2, 1, 8, 12, dtype="bool")
COMPRESSED = tensor(2048, 2048, dtype="bool")
BASE = Attention(Q, KV, KV, 4, attn_mask=MASK, input_layout="BNSD")
TND = Attention(tensor(8, 4, 32), tensor(12, 2, 32), tensor(12, 2, 32), 4, attn_mask=COMPRESSED, actual_seq_qlen=(3, 8),
                actual_seq_kvlen=(5, 12), next_tokens=0, input_layout="TND", sparse_mode=2)  # fmt: skip
ROW = {"attn_mask": COMPRESSED, "sparse_mode": 2}

VALID = {
    "grouped keys": BASE,
    "no mask": BASE._replace(attn_mask=None),
    "mask of every head": BASE._replace(attn_mask=tensor(2, 4, 8, 12, dtype="uint8")),
    "one mask for all": BASE._replace(attn_mask=tensor(8, 12, dtype="bool"), sparse_mode=1),
    "causal": BASE._replace(next_tokens=0),
    "band below the diagonal": BASE._replace(pre_tokens=5, next_tokens=-2),
    "band above the diagonal": BASE._replace(pre_tokens=-2, next_tokens=5),
    "ignored without a mask": BASE._replace(attn_mask=None, pre_tokens=-5, next_tokens=-5),
    "compressed": BASE._replace(**ROW),
    "prefix": BASE._replace(sparse_mode=5, prefix=(4, 12)),
    "dropout": BASE._replace(keep_prob=0.9, drop_mask=tensor(2, 4, 8, 1, dtype="uint8")),
    "shift": BASE._replace(real_shift=tensor(1, 4, 8, 12)),
    "BSH": BASE._replace(query=tensor(2, 8, 128), key=tensor(2, 12, 64), value=tensor(2, 12, 64), input_layout="BSH"),
    "SBH": BASE._replace(query=tensor(8, 2, 128), key=tensor(12, 2, 64), value=tensor(12, 2, 64), input_layout="SBH"),
    "BSND": BASE._replace(query=tensor(2, 8, 4, 32), key=tensor(2, 12, 2, 32), value=tensor(2, 12, 2, 32), input_layout="BSND"),
    "TND": TND,
    "TND, right down": TND._replace(sparse_mode=3),
}

# what is changed in a valid call, the argument that the error names, the error; for both packages
BROKEN = {
    "dtype of the query": (BASE._replace(query=Q._replace(dtype="float64")), "query", TypeError),
    "dtype of the key": (BASE._replace(key=KV._replace(dtype="bfloat16")), "key", TypeError),
    "dtype of the value": (BASE._replace(value=KV._replace(dtype="bfloat16")), "value", TypeError),
    "unknown layout": (BASE._replace(input_layout="BDSN"), "input_layout", ValueError),
    "too few axes": (BASE._replace(input_layout="BSH"), "query", ValueError),
    "empty": (BASE._replace(query=tensor(2, 4, 0, 32)), "query", ValueError),
    "no heads": (BASE._replace(head_num=0), "head_num", ValueError),
    "too many heads": (BASE._replace(head_num=257), "head_num", ValueError),
    "other number of heads": (BASE._replace(head_num=2), "head_num", ValueError),
    "heads that do not divide H": (VALID["BSH"]._replace(head_num=3), "head_num", ValueError),
    "keys of other width than the head": (VALID["BSH"]._replace(key=tensor(2, 12, 80)), "key", ValueError),
    "batch of the key": (BASE._replace(key=tensor(1, 2, 12, 32)), "key", ValueError),
    "group ratio": (BASE._replace(key=tensor(2, 3, 12, 32), value=tensor(2, 3, 12, 32)), "key", ValueError),
    "head width of the key": (BASE._replace(key=tensor(2, 2, 12, 48), value=tensor(2, 2, 12, 48)), "key", ValueError),
    "length of the value": (BASE._replace(value=tensor(2, 2, 13, 32)), "value", ValueError),
    "heads of the value": (BASE._replace(value=tensor(2, 4, 12, 32)), "value", ValueError),
    "wider value": (BASE._replace(value=tensor(2, 2, 12, 48)), "value", ValueError),
    "wide head": (BASE._replace(**dict.fromkeys(("query", "key", "value"), tensor(2, 4, 8, 784))), "query", ValueError),
    "large batch": (BASE._replace(**dict.fromkeys(("query", "key", "value"), tensor(3 << 20, 4, 8, 32))), "query", ValueError),
    "long": (BASE._replace(key=tensor(2, 2, 2 << 20, 32), value=tensor(2, 2, 2 << 20, 32)), "query", ValueError),
    "unknown mode": (BASE._replace(sparse_mode=9), "sparse_mode", ValueError),
    "probability 0": (BASE._replace(keep_prob=0.0), "keep_prob", ValueError),
    "probability above 1": (BASE._replace(keep_prob=1.5), "keep_prob", ValueError),
    "precision": (BASE._replace(inner_precise=3), "inner_precise", ValueError),
    "padding mask": (BASE._replace(padding_mask=MASK), "padding_mask", ValueError),
    "dtype of the shift": (BASE._replace(real_shift=tensor(2, 4, 8, 12, dtype="float32")), "real_shift", TypeError),
    "shape of the shift": (BASE._replace(real_shift=tensor(2, 1, 8, 12)), "real_shift", ValueError),
    "dtype of the dropout": (BASE._replace(keep_prob=0.9, drop_mask=tensor(2, 4, 8, 1)), "drop_mask", TypeError),
    "dtype of the mask": (BASE._replace(attn_mask=MASK._replace(dtype="float16")), "attn_mask", TypeError),
    "transposed mask": (BASE._replace(attn_mask=tensor(2, 1, 12, 8, dtype="bool")), "attn_mask", ValueError),
    "mask of keys": (BASE._replace(attn_mask=tensor(2, 1, 1, 12, dtype="bool")), "attn_mask", ValueError),
    "full mask in a compressed mode": (BASE._replace(sparse_mode=2), "attn_mask", ValueError),
    "compressed mask in a full mode": (BASE._replace(attn_mask=COMPRESSED), "attn_mask", ValueError),
    "two axes with prefix": (
        BASE._replace(attn_mask=tensor(8, 12, dtype="bool"), sparse_mode=5, prefix=(4, 4)), "attn_mask", ValueError),
    "mode without its mask": (BASE._replace(attn_mask=None, sparse_mode=1), "attn_mask", ValueError),
    "both negative": (BASE._replace(pre_tokens=-1, next_tokens=-1), "pre_tokens", ValueError),
    "empty band above": (BASE._replace(pre_tokens=-5, next_tokens=4), "pre_tokens", ValueError),
    "beyond the keys": (BASE._replace(pre_tokens=-12), "pre_tokens", ValueError),
    "empty band below": (BASE._replace(pre_tokens=2, next_tokens=-3), "next_tokens", ValueError),
    "beyond the queries": (BASE._replace(next_tokens=-8), "next_tokens", ValueError),
    "prefix in another mode": (BASE._replace(prefix=(4, 4)), "prefix", ValueError),
    "mode 5 without prefix": (BASE._replace(sparse_mode=5), "prefix", ValueError),
    "one prefix for two rows": (BASE._replace(sparse_mode=5, prefix=(4,)), "prefix", ValueError),
    "short prefix": (BASE._replace(sparse_mode=5, prefix=(4, 3)), "prefix", ValueError),
    "long prefix": (BASE._replace(sparse_mode=5, prefix=(13, 4)), "prefix", ValueError),
    "lengths without TND": (BASE._replace(actual_seq_qlen=(2, 8)), "actual_seq_qlen", ValueError),
    "key lengths without TND": (BASE._replace(actual_seq_kvlen=(2, 12)), "actual_seq_kvlen", ValueError),
    "TND without lengths": (TND._replace(actual_seq_qlen=None), "actual_seq_qlen", ValueError),
    "TND without key lengths": (TND._replace(actual_seq_kvlen=None), "actual_seq_kvlen", ValueError),
    "lengths, not their sums": (TND._replace(actual_seq_qlen=(5, 3)), "actual_seq_qlen", ValueError),
    "not all tokens": (TND._replace(actual_seq_kvlen=(5, 11)), "actual_seq_kvlen", ValueError),
    "other number of sequences": (TND._replace(actual_seq_kvlen=(5, 7, 12)), "actual_seq_kvlen", ValueError),
    "sequence without keys": (TND._replace(actual_seq_kvlen=(0, 12)), "actual_seq_kvlen", ValueError),
    "too many sequences": (
        TND._replace(query=tensor(1025, 4, 32), actual_seq_qlen=tuple(range(1, 1026))), "actual_seq_qlen", ValueError),
    "more queries than keys": (
        TND._replace(sparse_mode=3, actual_seq_qlen=(6, 8), actual_seq_kvlen=(5, 12)), "sparse_mode", ValueError),
    "mode 5 with TND": (TND._replace(sparse_mode=5), "sparse_mode", ValueError),
}  # fmt: skip

# rules that one package has and the other has not
def alike(*shape, dtype="float16"):
    """The call with this shape and dtype of query, key and value, without a mask."""
    return BASE._replace(**dict.fromkeys(("query", "key", "value"), tensor(*shape, dtype=dtype)), attn_mask=None)


OF_MINDSPORE = {
    "float32": (alike(2, 4, 8, 32, dtype="float32"), "query", TypeError),
    "width 72": (alike(2, 4, 8, 72), "query", ValueError),
    "width 528": (alike(2, 4, 8, 528), "query", ValueError),
    "narrow value": (BASE._replace(value=tensor(2, 2, 12, 16)), "value", ValueError),
    "mask for all rows": (BASE._replace(attn_mask=tensor(1, 1, 8, 12, dtype="bool")), "attn_mask", ValueError),
    "mode 6": (BASE._replace(sparse_mode=6), "sparse_mode", ValueError),
    "TND, mode 0": (TND._replace(attn_mask=None, sparse_mode=0), "sparse_mode", ValueError),
    "TND, next_tokens": (TND._replace(next_tokens=1), "next_tokens", ValueError),
    "TND, pre_tokens": (TND._replace(pre_tokens=4), "pre_tokens", ValueError),
    "shape of the dropout": (
        BASE._replace(keep_prob=0.9, drop_mask=tensor(2, 4, 8, 12, dtype="uint8")), "drop_mask", ValueError),
    "dropout of nothing": (BASE._replace(drop_mask=tensor(2, 4, 8, 1, dtype="uint8")), "drop_mask", ValueError),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid_calls(package, name):
    rules(package).validate(VALID[name])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_calls(package, name):
    call, argument, error = BROKEN[name]
    documented = rules(package)
    with pytest.raises(error, match=rf"^{documented.names.get(argument, argument)}: .*\[.*\]$"):
        documented.validate(call)


@pytest.mark.parametrize("name", OF_MINDSPORE)
def test_rules_of_one_package(package, name):
    call, argument, error = OF_MINDSPORE[name]
    if package == "mindspore":
        with pytest.raises(error, match=rf"^{argument}: .*\[.*\]$"):
            rules(package).validate(call)
    elif name == "mode 6":
        with pytest.raises(NotImplementedError):
            rules(package).validate(call)
    else:
        rules(package).validate(call)


class MindSpore:
    """The operators on tensors of zeros."""

    def __init__(self):
        import mindspore as ms

        from parity.documented import mindspore_ascend

        self.attention, self.rms_norm = mindspore_ascend.flash_attention_score, mindspore_ascend.rms_norm
        self.rotary, self.swiglu, self.gelu = (
            mindspore_ascend.rotary_position_embedding, mindspore_ascend.swiglu, mindspore_ascend.gelu)  # fmt: skip
        self.zeros = lambda *shape, dtype="float16": ms.ops.zeros(shape, ms.bool_ if dtype == "bool" else getattr(ms, dtype))


class Torch:
    """The operators on tensors of zeros."""

    def __init__(self):
        import torch

        from parity.documented import torch_npu

        made = torch_npu.module()
        self.attention, self.rms_norm, self.rotary, self.swiglu = (
            made.npu_fusion_attention, made.npu_rms_norm, made.npu_rotary_mul, made.npu_swiglu)  # fmt: skip
        self.zeros = lambda *shape, dtype="float16": torch.zeros(shape, dtype=getattr(torch, dtype))


@pytest.fixture
def operators(package):
    return {"mindspore": MindSpore, "torch": Torch}[package]()


NAMES = {"real_shift": "pse", "attn_mask": "atten_mask", "pre_tokens": "pre_tockens", "next_tokens": "next_tockens",
         "drop_mask": "dropout_mask"}  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "error"), [
    ("query", ((2, 4, 8, 32), "float64"), TypeError),
    ("key", ((2, 2, 12, 48), "float16"), ValueError),
    ("value", ((2, 2, 13, 32), "float16"), ValueError),
    ("head_num", 8, ValueError),
    ("real_shift", ((2, 1, 8, 12), "float16"), ValueError),
    ("drop_mask", ((2, 4, 8, 1), "float16"), TypeError),
    ("padding_mask", ((8, 12), "bool"), ValueError),
    ("attn_mask", ((12, 8), "bool"), ValueError),
    ("prefix", (1, 2), ValueError),
    ("actual_seq_qlen", (2, 8), ValueError),
    ("actual_seq_kvlen", (2, 12), ValueError),
    ("keep_prob", 0.0, ValueError),
    ("pre_tokens", -12, ValueError),
    ("next_tokens", -8, ValueError),
    ("inner_precise", 7, ValueError),
    ("input_layout", "NBSD", ValueError),
    ("sparse_mode", 11, ValueError),
])  # fmt: skip
def test_every_argument_of_attention_reaches_the_rules(package, operators, argument, value, error):
    q, kv, mask = operators.zeros(2, 4, 8, 32), operators.zeros(2, 2, 12, 32), operators.zeros(8, 12, dtype="bool")
    arguments = {"query": q, "key": kv, "value": kv, "head_num": 4, "input_layout": "BNSD", "attn_mask": mask}
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        value = operators.zeros(*value[0], dtype=value[1])
    arguments[argument] = value
    named = {NAMES.get(name, name) if package == "torch" else name: given for name, given in arguments.items()}
    with pytest.raises(error, match=rf"{NAMES.get(argument, argument) if package == 'torch' else argument}: "):
        operators.attention(**named)


@pytest.mark.parametrize(("argument", "value"), [
    ("scalar_value", 1), ("keep_prob", 1), ("sparse_mode", 0.0), ("input_layout", 4), ("real_shift", None)
])  # fmt: skip
def test_types_of_mindspores_arguments(argument, value):
    pytest.importorskip("mindspore")
    operators = MindSpore()
    q = operators.zeros(1, 2, 4, 16)
    arguments = {"input_layout": "BNSD", argument: value}
    if value is None:  # valid
        operators.attention(q, q, q, 2, **arguments)
        return
    with pytest.raises(TypeError, match=argument):
        operators.attention(q, q, q, 2, **arguments)


def of(package, both, torch):
    return torch if package == "torch" else both


def test_rms_norm(package, operators):
    zeros = operators.zeros
    operators.rms_norm(zeros(2, 3, 4), zeros(4))
    with pytest.raises(TypeError, match=r"^(x|self): "):
        operators.rms_norm(zeros(2, 3, 4, dtype="float64"), zeros(4, dtype="float64"))
    with pytest.raises(TypeError, match=r"^gamma: "):
        operators.rms_norm(zeros(2, 3, 4), zeros(4, dtype="bfloat16"))
    for shape in ((3,), (2, 4), (2, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"^gamma: "):
            operators.rms_norm(zeros(2, 3, 4), zeros(*shape))
    if package == "torch":  # its documentation allows a float32 weight
        operators.rms_norm(zeros(2, 3, 4), zeros(4, dtype="float32"))
        with pytest.raises(ValueError, match=r"^self: "):
            operators.rms_norm(zeros(4), zeros(4))
    else:
        with pytest.raises(TypeError, match=r"^gamma: "):
            operators.rms_norm(zeros(2, 3, 4), zeros(4, dtype="float32"))
        for epsilon in (0.0, 2.0, 1):
            with pytest.raises(ValueError, match=r"^epsilon: "):
                operators.rms_norm(zeros(2, 3, 4), zeros(4), epsilon)


def test_rotary_embedding(package, operators):
    zeros, names = operators.zeros, of(package, ("x", "cos", "sin", "mode"), ("input", "r1", "r2", "rotary_mode"))
    interleaved = of(package, 1, "interleave")

    def call(x, cos, sin=None, *mode):
        return operators.rotary(zeros(*x), zeros(*cos), zeros(*(sin or cos)), *mode)

    for cos in ((2, 1, 6, 8), (1, 1, 6, 8), (2, 3, 6, 8), (1, 3, 1, 8), (2, 1, 1, 8)):  # BNSD, BSND, SBND
        call((2, 3, 6, 8), cos)
    call((2, 3, 6, 8), (1, 1, 6, 8), None, interleaved)
    with pytest.raises(ValueError, match=f"^{names[1]}: "):
        call((2, 3, 6, 8), (2, 1, 6, 8), None, interleaved)
    with pytest.raises(ValueError, match=f"^{names[1]}: "):
        call((2, 3, 6, 8), (1, 1, 1, 8))
    with pytest.raises(ValueError, match=f"^{names[1]}: "):
        call((2, 3, 6, 8), (2, 1, 6, 4))
    with pytest.raises(ValueError, match=f"^{names[2]}: "):
        call((2, 3, 6, 8), (2, 1, 6, 8), (1, 1, 6, 8))
    for width in (7, 896):
        with pytest.raises(ValueError, match=f"^{names[0]}: "):
            call((2, 3, 6, width), (1, 1, 6, width))
    with pytest.raises(ValueError, match=f"^{names[0]}: "):
        call((2, 3), (2, 3))
    with pytest.raises(ValueError, match=f"^{names[0]}: "):
        call((1, 1000, 200, 4), (1, 1, 200, 4))
    with pytest.raises(ValueError, match=f"^{names[3]}: "):
        call((2, 3, 6, 8), (1, 1, 6, 8), None, of(package, 2, "quarter"))
    with pytest.raises(TypeError, match=f"^{names[0]}: "):
        operators.rotary(*(zeros(1, 1, 6, 8, dtype="float64"),) * 3)
    if package == "mindspore":
        with pytest.raises(TypeError, match=r"^cos: "):
            operators.rotary(zeros(2, 3, 6, 8), *(zeros(2, 1, 6, 8, dtype="float32"),) * 2)
        with pytest.raises(ValueError, match="slow"):  # generating one token: B N > 8 S
            call((2, 12, 1, 128), (2, 1, 1, 128))
    else:
        with pytest.raises(ValueError, match=r"^input: "):
            call((20, 50, 6, 8), (1, 1, 6, 8), None, "interleave")
        call((20, 50, 6, 8), (1, 1, 6, 8))
        operators.rotary(zeros(6, 3, 8), zeros(6, 1, 8), zeros(6, 1, 8))  # TND
        cos = zeros(1, 1, 6, 8).requires_grad_()
        operators.rotary(zeros(2, 3, 6, 8), cos, cos)
        with pytest.raises(ValueError, match=r"^input: "):
            operators.rotary(zeros(30, 50, 6, 8), cos, cos)


def test_swiglu(package, operators):
    zeros = operators.zeros
    for dim in (-2, 2, -3):
        with pytest.raises(ValueError, match=r"^(dim|input): "):
            operators.swiglu(zeros(3, 4), dim)
    with pytest.raises(TypeError, match=r"^input: "):
        operators.swiglu(zeros(3, 4, dtype="float64"))
    if package == "torch":
        with pytest.raises(ValueError, match=r"^input: .*contiguous"):
            operators.swiglu(zeros(4, 4).t())
        with pytest.raises(ValueError, match=r"^input: .*empty"):
            operators.swiglu(zeros(0, 4))
        with pytest.raises(ValueError, match=r"^input: "):
            operators.swiglu(zeros(*(2,) * 9))
    else:
        with pytest.raises(TypeError, match=r"^dim: "):
            operators.swiglu(zeros(3, 4), 1.0)


def test_gelu():
    pytest.importorskip("mindspore")
    operators = MindSpore()
    with pytest.raises(ValueError, match=r"^approximate: "):
        operators.gelu(operators.zeros(3), approximate="sigmoid")
    with pytest.raises(TypeError, match=r"^input: "):
        operators.gelu(operators.zeros(3, dtype="int32"), approximate="tanh")
