"""The stand-ins of MindSpore's fused operators compute what the documentation says, in PyNative and in a graph; and
`ms_granvit`'s calls of them are right: padding, scale, mask, grouped keys."""
import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore import Tensor, ops  # noqa: E402

from granvit.config import language_config, vision_config  # noqa: E402
from ms_granvit.language import CausalDecoder  # noqa: E402
from ms_granvit.ops.table import kernels_for  # noqa: E402
from ms_granvit.vision import VisionEncoder  # noqa: E402
from parity.documented import mindspore_ascend  # noqa: E402
from tests.ascend import oracle  # noqa: E402
from tests.ascend.oracle import ROUNDED, SEGMENTS  # noqa: E402

SCALE = 0.2


def differentiated(function, tensors, cotangent, graph):
    """The result of `function(*tensors)` and the gradients of its product with the cotangent, as float64 arrays."""

    def total(cotangent, *tensors):
        out = function(*tensors)
        return (ops.cast(out, ms.float32) * cotangent).sum(), out

    run = ms.value_and_grad(total, tuple(range(1, len(tensors) + 1)), has_aux=True)
    (_, out), gradients = (ms.jit(run) if graph else run)(Tensor(cotangent.astype(np.float32)), *map(Tensor, tensors))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return out.asnumpy().astype(np.float64), [g.asnumpy().astype(np.float64) for g in gradients]


def compare(found, expected):
    (out, gradients), (expected_out, expected_gradients) = found, expected
    np.testing.assert_allclose(out, expected_out, **ROUNDED)
    for which, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        np.testing.assert_allclose(gradient, wanted, **ROUNDED, err_msg=f"gradient {which}")


@pytest.fixture
def calls():
    """In PyNative mode, whatever mode tests before have left; `differentiated` compiles where it is asked to."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    with mindspore_ascend.installed() as made:
        yield made
    ms.set_context(mode=before)


@pytest.mark.parametrize("graph", [False, True])
def test_attention_with_the_shared_prefix_mask_and_grouped_keys(calls, graph):
    q, k, v, cotangent = oracle.inputs(16)
    discarded = oracle.shared_prefix(SEGMENTS)
    mask = Tensor(discarded)

    def call(q, k, v):
        return ops.flash_attention_score(q, k, v, 4, attn_mask=mask, scalar_value=SCALE, input_layout="BNSD")

    compare(differentiated(call, (q, k, v), cotangent, graph), oracle.attention(q, k, v, discarded, SCALE, cotangent))
    assert len(calls) == 1
    assert calls[0].shapes == {"query": q.shape, "key": k.shape, "value": v.shape, "attn_mask": discarded.shape}
    assert calls[0].dtypes == {"query": "float16", "key": "float16", "value": "float16", "attn_mask": "bool"}
    assert calls[0].arguments["scalar_value"] == SCALE and calls[0].arguments["sparse_mode"] == 0


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND"])
def test_layouts(calls, layout):
    q, k, v, cotangent = oracle.inputs(16)
    expected, _ = oracle.attention(q, k, v, False, SCALE, cotangent)
    axes = {"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3)}[layout]
    arranged = [x.transpose(axes) for x in (q, k, v)]
    if layout != "BSND":
        arranged = [x.reshape(*x.shape[:2], -1) for x in arranged]
    out = ops.flash_attention_score(*map(Tensor, arranged), 4, scalar_value=SCALE, input_layout=layout).asnumpy()
    np.testing.assert_allclose(out, expected.transpose(axes).reshape(out.shape), **ROUNDED)


TRIANGLE = np.triu(np.ones((2048, 2048), bool), 1)  # the compressed mask of modes 2, 3 and 4


def modes(S, L):
    """Arguments of each sparse mode and what it keeps, from the descriptions of the modes."""
    i, j = np.arange(S)[:, None], np.arange(L)
    any_mask = np.random.default_rng(3).random((S, L)) < 0.3
    any_mask[:, 0] = False  # no query without a key
    corner = i + L - S  # the key at the diagonal that ends in the lower right corner
    yield {"sparse_mode": 0, "attn_mask": any_mask}, ~any_mask
    yield {"sparse_mode": 0, "attn_mask": any_mask, "next_tokens": 0}, ~any_mask & (j <= i)
    yield {"sparse_mode": 0, "attn_mask": np.zeros((S, L), bool), "pre_tokens": 3, "next_tokens": 2}, (j <= i + 2) & (j >= i - 3)
    yield {"sparse_mode": 1, "attn_mask": any_mask, "next_tokens": 0}, ~any_mask  # ignores next_tokens
    yield {"sparse_mode": 2, "attn_mask": TRIANGLE}, j <= i
    yield {"sparse_mode": 3, "attn_mask": TRIANGLE}, j <= corner
    yield {"sparse_mode": 4, "attn_mask": TRIANGLE, "pre_tokens": 4, "next_tokens": 1}, (j <= corner + 1) & (j >= corner - 4)
    prefix = np.array([7, 9])[:, None, None, None]
    kept = (j <= corner) | (j < prefix)
    yield {"sparse_mode": 5, "attn_mask": ~kept, "prefix": (7, 9)}, kept


@pytest.mark.parametrize(("S", "L"), [(13, 13), (9, 14)])
@pytest.mark.parametrize("number", range(8))
def test_sparse_modes(calls, number, S, L):
    rng = np.random.default_rng(number)
    q, k, v = (rng.standard_normal((2, 2, n, 16)).astype(np.float16) for n in (S, L, L))
    arguments, kept = list(modes(S, L))[number]
    expected, _ = oracle.attention(q, k, v, ~kept, SCALE, q)
    arguments["attn_mask"] = Tensor(arguments["attn_mask"])
    out = ops.flash_attention_score(*map(Tensor, (q, k, v)), 2, scalar_value=SCALE, input_layout="BNSD", **arguments)
    np.testing.assert_allclose(out.asnumpy(), expected, **ROUNDED)


@pytest.mark.parametrize("mode", [2, 3])
def test_several_sequences_in_one_row(calls, mode):
    rng, ends_q, ends_kv = np.random.default_rng(0), (4, 9, 11), (6, 11, 16)
    q, k, v = (rng.standard_normal((n, 2, 16)).astype(np.float16) for n in (11, 16, 16))
    out = ops.flash_attention_score(*map(Tensor, (q, k, v)), 2, attn_mask=Tensor(TRIANGLE), scalar_value=SCALE, next_tokens=0,
                                    input_layout="TND", sparse_mode=mode, actual_seq_qlen=ends_q,
                                    actual_seq_kvlen=ends_kv).asnumpy()  # fmt: skip
    for q0, q1, k0, k1 in zip((0, *ends_q[:-1]), ends_q, (0, *ends_kv[:-1]), ends_kv, strict=True):
        S, L = q1 - q0, k1 - k0
        kept = np.arange(L) <= np.arange(S)[:, None] + (L - S if mode == 3 else 0)
        parts = [x.transpose(1, 0, 2)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        expected, _ = oracle.attention(*parts, ~kept, SCALE, parts[0])
        np.testing.assert_allclose(out[q0:q1], expected[0].transpose(1, 0, 2), **ROUNDED)


def test_an_inverted_compressed_mask_changes_the_result(calls):
    q, k, v, _ = oracle.inputs(16)
    outputs = []
    for mask in (TRIANGLE, ~TRIANGLE):
        arguments = {"attn_mask": Tensor(mask), "input_layout": "BNSD", "sparse_mode": 2}
        outputs.append(ops.flash_attention_score(*map(Tensor, (q, k, v)), 4, **arguments).asnumpy())
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


def flash(width):
    """ms_granvit's flash attention as an engine on an NPU picks it: its mask of segments, and itself."""
    return kernels_for("npu", ms.float16, {"attention": "flash"}).attention(head_dim=width, masked=True, cached=False)


@pytest.mark.parametrize(("width", "graph"), [(72, False), (72, True), (16, False)])  # 72 is padded to 80
def test_flash_follows_the_definition_through_the_stand_in(calls, width, graph):
    q, k, v, cotangent = oracle.inputs(width)
    mask_of, attend = flash(width)
    segments = Tensor(SEGMENTS)

    def call(q, k, v):
        return attend(q, k, v, mask_of(segments))

    expected = oracle.attention(q, k, v, oracle.shared_prefix(SEGMENTS), width**-0.5, cotangent)
    compare(differentiated(call, (q, k, v), cotangent, graph), expected)
    assert [call.shapes["query"][-1] for call in calls] == [width + -width % 16]
    assert calls[0].shapes["key"][1] == 2  # keys are not repeated


@pytest.mark.parametrize("S", [1, 5])
def test_flash_with_the_mask_of_caches_sees_keys_beyond_its_own_number(calls, S):
    """Generation: S new tokens, after which slots of the caches are still empty. The keys before them are in slots above S."""
    q, k, v, cotangent = oracle.inputs(16)
    L, positions = k.shape[2], 6 + np.arange(S)
    allowed = np.arange(L) <= positions[:, None]
    _, attend = flash(16)
    mask = np.broadcast_to(allowed, (2, 1, S, L))
    out = attend(*map(Tensor, (q[:, :, :S], k, v)), Tensor(np.ascontiguousarray(mask))).asnumpy()
    expected, _ = oracle.attention(q[:, :, :S], k, v, ~mask, 0.25, cotangent[:, :, :S])
    np.testing.assert_allclose(out, expected, **ROUNDED)


def test_flash_without_a_mask(calls):
    q, k, v, cotangent = oracle.inputs(72, (4, 4, 4))
    _, attend = flash(72)

    def call(q, k, v):
        return attend(q, k, v, None)

    compare(differentiated(call, (q, k, v), cotangent, True), oracle.attention(q, k, v, False, 72**-0.5, cotangent))
    assert "attn_mask" not in calls[0].shapes


def test_an_inverted_mask_in_flash_is_noticed(calls, monkeypatch):
    """Fails the comparison of the test above if flash passed the mask the wrong way round: the stand-in then gets it inverted."""
    q, k, v, cotangent = oracle.inputs(16)
    (mask_of, attend), documented = flash(16), ops.flash_attention_score

    def inverted(query, key, value, head_num, attn_mask=None, **others):
        return documented(query, key, value, head_num, attn_mask=ops.logical_not(attn_mask), **others)

    monkeypatch.setattr(ops, "flash_attention_score", inverted)
    out = attend(*map(Tensor, (q, k, v)), mask_of(Tensor(SEGMENTS))).asnumpy()
    expected, _ = oracle.attention(q, k, v, oracle.shared_prefix(SEGMENTS), 0.25, cotangent)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(out, expected, **ROUNDED)


def test_encoder_and_decoder_run_on_flash(calls):
    """The forward passes of whole modules, the decoder's in a graph, against composed attention; everything is in float16."""
    rng, language = np.random.default_rng(0), language_config("tiny-language")
    inputs = rng.standard_normal((2, SEGMENTS.shape[1], language.width)).astype(np.float16)
    positions = np.tile(np.arange(SEGMENTS.shape[1], dtype=np.int32), (2, 1))
    pixels = rng.integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    cases = (
        ("decoder", lambda kernels: CausalDecoder(language, ms.float16, kernels), (inputs, positions, SEGMENTS)),
        ("encoder", lambda kernels: VisionEncoder(vision_config("tiny-vision"), ms.float16, kernels=kernels).encode, (pixels,)),
    )
    for name, build, arrays in cases:
        outputs = []
        for attention in ("flash", "composed"):
            named = dict.fromkeys(("rms_norm", "rope", "swiglu", "gelu"), "composed") | {"attention": attention}
            call = build(kernels_for("npu", ms.float16, named))
            cell = getattr(call, "__self__", call)
            weights = np.random.default_rng(1)
            for parameter in cell.get_parameters():
                parameter.set_data(Tensor(0.3 * weights.standard_normal(parameter.shape).astype(np.float32)))
            run = ms.jit(call) if (name, attention) == ("decoder", "flash") else call
            out = run(*map(Tensor, arrays))
            outputs.append((out[0] if isinstance(out, tuple) else out).asnumpy().astype(np.float64))
        assert np.abs(outputs[0] - outputs[1]).max() < 0.01 * np.abs(outputs[1]).max() > 0, name
    assert {tuple(call.shapes) for call in calls} == {("query", "key", "value", "attn_mask"), ("query", "key", "value")}


def numeric(definition, arrays, cotangent, h=1e-5):
    """The definition's value in float64, and its gradients by central differences."""
    arrays = [a.astype(np.float64) for a in arrays]
    gradients = []
    for which, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            ends = []
            for step in (h, -h):
                moved = [a.copy() for a in arrays]
                moved[which][at] += step
                ends.append((definition(*moved) * cotangent).sum())
            gradient[at] = (ends[0] - ends[1]) / (2 * h)
        gradients.append(gradient)
    return definition(*arrays), gradients


def rms(x, g):
    axes = tuple(range(-g.ndim, 0))
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 0.01) * g


def rotated(x, half):
    if half:
        first, second = np.split(x, 2, -1)
        return np.concatenate((-second, first), -1)
    return np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)


def silu_gated(x, axis):
    a, b = np.split(x, 2, axis)
    return a / (1 + np.exp(-a)) * b


RNG = np.random.default_rng(7)
X, G = RNG.standard_normal((2, 3, 4)).astype(np.float16), RNG.standard_normal(4).astype(np.float16)
HEADS = RNG.standard_normal((2, 2, 3, 4)).astype(np.float16)
ANGLES = RNG.uniform(0, 6, (2, 1, 3, 4))
COS, SIN = (f(ANGLES).astype(np.float16) for f in (np.cos, np.sin))

G2 = RNG.standard_normal((3, 4)).astype(np.float16)

SMALL = {
    "rms_norm": (lambda x, g: ops.rms_norm(x, g, 0.01)[0], rms, (X, G)),
    "rms_norm over two axes": (lambda x, g: ops.rms_norm(x, g, 0.01)[0], rms, (X, G2)),
    "rotary, halves": (lambda x, c, s: ops.rotary_position_embedding(x, c, s),
                       lambda x, c, s: x * c + rotated(x, True) * s, (HEADS, COS, SIN)),
    "rotary, interleaved": (lambda x, c, s: ops.rotary_position_embedding(x, c, s, 1),
                            lambda x, c, s: x * c + rotated(x, False) * s, (HEADS, COS[:1], SIN[:1])),
    "swiglu": (lambda x: ops.swiglu(x), lambda x: silu_gated(x, -1), (X,)),
    "swiglu along an axis": (lambda x: ops.swiglu(x, 0), lambda x: silu_gated(x, 0), (X,)),
    "gelu": (lambda x: ops.gelu(x, approximate="tanh"),
             lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2, (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_operators(calls, name):
    call, definition, arrays = SMALL[name]
    cotangent = np.random.default_rng(1).standard_normal(definition(*arrays).shape).astype(np.float16)
    compare(differentiated(call, arrays, cotangent, False), numeric(definition, arrays, cotangent.astype(np.float64)))
    assert len(calls) == 1 and set(calls[0].dtypes.values()) == {"float16"}


def test_small_operators_compile(calls):
    def run(x, g, heads, cos, sin):
        y, reciprocal = ops.rms_norm(x, g, 0.01)
        return y, reciprocal, ops.rotary_position_embedding(heads, cos, sin), ops.swiglu(x), ops.gelu(x, approximate="tanh")

    arrays = (X, G, HEADS, COS, SIN)
    for in_graph, alone in zip(ms.jit(run)(*map(Tensor, arrays)), run(*map(Tensor, arrays)), strict=True):
        assert in_graph.dtype == alone.dtype and in_graph.shape == alone.shape
        np.testing.assert_allclose(in_graph.asnumpy(), alone.asnumpy(), **ROUNDED)
    assert [call.operator for call in calls[:4]] == ["rms_norm", "rotary_position_embedding", "swiglu", "gelu"]


def test_rms_norm_also_returns_the_reciprocal_in_float32(calls):
    _, reciprocal = ops.rms_norm(Tensor(X), Tensor(G), 0.01)
    assert reciprocal.dtype == ms.float32
    expected = 1 / np.sqrt((X.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.01)
    np.testing.assert_allclose(reciprocal.asnumpy(), expected, rtol=1e-6)


def test_bfloat16_is_taken(calls):
    q = Tensor(np.zeros((1, 2, 3, 16), np.float32)).astype(ms.bfloat16)
    assert ops.flash_attention_score(q, q, q, 2, input_layout="BNSD").dtype == ms.bfloat16
    assert calls[0].dtypes["query"] == "bfloat16"


def test_installed_ends():
    before = ops.flash_attention_score
    with mindspore_ascend.installed():
        assert ops.flash_attention_score is mindspore_ascend.flash_attention_score
    assert ops.flash_attention_score is before
