"""The small operators' kernels as custom operators of MindSpore: gradients in both modes, and AdamW in place."""
import numpy as np
import pytest

from tests.native import oracle, small_oracle

ms = pytest.importorskip("mindspore")

from mindspore import Parameter, ParameterTuple, Tensor, nn  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def small(kernels):
    from ms_granvit.ops import native_small

    return native_small


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("operator, case, differentiated", [
    ("layer_norm", 3, (0, 1, 2)), ("rms_norm", 3, (0, 1)), ("rope", 1, (0,)), ("swiglu", 0, (0, 1)), ("gelu", 0, (0,)),
])  # fmt: skip
def test_mindspore_small_operator_equals_its_definition(small, operator, case, differentiated, mode):
    arguments = small_oracle.CASES[operator][case]
    inputs, dout = [Tensor(x) for x in arguments[:-1]], Tensor(arguments[-1])
    if operator == "rope":
        inputs[1:] = [x.expand_dims(1) for x in inputs[1:]]
    function, rest = getattr(small, operator), (1e-5,) if operator.endswith("norm") else ()

    def weighed(*inputs):
        out = function(*inputs, *rest)
        return (out * dout).sum(), out

    both = ms.value_and_grad(weighed, differentiated, has_aux=True)
    (_, out), gradients = (ms.jit(both) if mode == "graph" else both)(*inputs)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    oracle.assert_near([x.asnumpy() for x in (out, *gradients)], small_oracle.OPERATORS[operator][1](*arguments))


class Update(nn.Cell):
    def __init__(self, move, arrays):
        super().__init__()
        self.move, self.arrays = move, ParameterTuple(Parameter(Tensor(x), name=f"x{n}") for n, x in enumerate(arrays))

    def construct(self, scale, decay_factor, rate, correction2):
        first = self.move(*self.arrays[:4], scale, decay_factor, rate, correction2, 0.9, 0.98, 1e-8)
        second = self.move(*self.arrays[4:], scale, None, rate, correction2, 0.9, 0.98, 1e-8)
        return first.sum() + second.sum()


def test_mindspore_adamw_in_place_has_the_bits_of_the_composed_one(small):
    """Two steps, the second from a gradient of zero; one parameter decays, the other does not."""
    from ms_granvit.ops import adamw

    arrays = [np.abs(oracle.normal([n, axes], *shape)) for axes, shape in enumerate(((33, 7), (50,))) for n in range(4)]
    factors = [Tensor(x, ms.float32) for x in (0.37, 0.99, 1e-3, 0.1)]
    updates = [Update(move, arrays) for move in (adamw.composed, small.adamw)]
    for _ in range(2):
        for update in updates:
            update(*factors)
        for composed, native in zip(*(update.arrays for update in updates), strict=True):
            assert np.array_equal(composed.asnumpy(), native.asnumpy())
        assert not updates[1].arrays[1].asnumpy().any()


def test_mindspore_a_wrong_argument_of_a_small_operator_is_named(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MindSpore writes the graph that it could not compile
    x = ms.ops.ones((2, 4))
    with pytest.raises(ValueError, match="up has shape"):
        small.swiglu(x, x[:, :3])
    with pytest.raises(ValueError, match="weight has shape"):
        small.rms_norm(x, x[0, :3], 1e-5)
    with pytest.raises(ValueError, match="argument 1 is float16"):
        small.gelu(x.astype(ms.float16))
