"""The graphs of a step and of generation for an NPU, in bfloat16 with the fused attention. They are compiled, not run."""
import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore import Tensor, nn, ops  # noqa: E402

from granvit.config import RunConfig, resolve_models  # noqa: E402
from granvit.engine import StepInputs  # noqa: E402
from granvit.init import initial_values  # noqa: E402
from granvit.models import LanguageConfig, VisionConfig, parameter_shapes  # noqa: E402
from ms_granvit import distributed  # noqa: E402
from ms_granvit.engine import Engine, scalar  # noqa: E402
from parity.fixture import random_batch  # noqa: E402
from tests.helpers import run_config  # noqa: E402
from tests.ms.ir import compiled, faults, operators  # noqa: E402

PROMPT, NEW = 32, 4
CROP = 16  # the teacher's positions are resampled


def shallow_models(config: RunConfig) -> tuple[VisionConfig, LanguageConfig]:
    """The tiny models with the smallest number of layers: every layer has the same operators."""
    vision, language = resolve_models(config)
    return vision.model_copy(update={"layers": 2}), language.model_copy(update={"layers": 1})


@pytest.fixture(scope="module")
def engine():
    """An engine that is built for an NPU; its graphs cannot be run here."""
    config = run_config(runtime={"compute": "bfloat16"}, distill={"crop_size": CROP}, optimizer={"weight_decay": 0.1})
    models = shallow_models(config)
    assert models[0].width // models[0].heads % 16, "the head width must need padding for the fused attention, as SigLIP's does"
    made = Engine(config, *models, initial_values(parameter_shapes(*models), 0).items(), distributed.Ranks(0, 1, "npu"))
    assert made.kernels.names["attention"] == "flash"
    return made


def graphs(engine: Engine) -> dict[str, tuple[nn.Cell, list]]:
    """Every graph that the engine launches on one rank, and inputs for it."""
    vision, language = shallow_models(engine.config)
    batch = random_batch(vision, language, 2, 2, 48, 12, 0, CROP)
    ids = Tensor(np.ones((2, PROMPT), np.int32))
    caches = [
        Tensor(np.zeros((language.layers, 2, language.kv_heads, PROMPT + NEW, language.head_dim)), ms.bfloat16) for _ in range(2)
    ]
    inputs = engine.inputs(batch, StepInputs(1, 1e-3, 0.9, batch.tokens, batch.boxes))
    two, three = (Tensor(np.ones(size, np.float32)) for size in (2, 3))
    return {
        "micro_batch": (engine.micro_batch, [three, *inputs]),
        "held_out": (engine.held_out, [two, *inputs]),
        "reduce": (engine.reduce, [three]),
        "update": (engine.update, [three, three, scalar(1.0), scalar(1.0)]),
        "ema": (engine.ema, [scalar(0.9), scalar(0.1)]),
        "prefill": (engine.prefill, [Tensor(batch.pixels_B3RR), ids, ids[:, 0], Tensor(batch.image_positions_BN), NEW]),
        "decode": (engine.decode, [ids[:, :1], ids[:, :1], *caches]),
    }


def test_no_graph_calls_the_host_or_makes_64_bit_tensors_or_unknown_shapes(engine):
    for name, (cell, inputs) in graphs(engine).items():
        phase = compiled(cell, *inputs)
        assert operators(phase) > 20, name
        assert faults(phase) == [], name


class Planted(nn.Cell):
    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def construct(self, x: Tensor) -> Tensor:
        if self.what == "float64":
            return ops.cast(ops.cast(x, ms.float64) * 2, ms.float32)
        if self.what == "int64":
            return ops.gather(x, ops.argmax(x, -1), 1)
        if self.what == "print":
            ops.print_("seen", x)
            return x * 2
        if self.what == "python":
            return Tensor(x.asnumpy() * 2)
        if self.what == "constant":
            return x * Tensor([2.0, 3.0, 4.0, 5.0], ms.float64)
        if self.what == "shape":
            return ops.gather(x, ops.cast(ops.nonzero(x)[:, 0], ms.int32), 0)
        return x * 2


@pytest.mark.parametrize(
    "what, said",
    [("float64", "DT_FLOAT64"), ("int64", "DT_INT64"), ("print", "Print calls the host"), ("python", "calls the host"),
     ("constant", "DT_FLOAT64"), ("shape", "dynamic shape"), ("nothing", None)],
)  # fmt: skip
def test_what_the_walk_looks_for_is_found_where_it_is_planted(what, said):
    cell = Planted(what)  # the graph lives as long as this variable
    found = faults(compiled(cell, Tensor(np.ones((3, 4), np.float32))))
    assert any(said in line for line in found) if said else found == []
