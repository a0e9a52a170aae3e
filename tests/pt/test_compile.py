"""`runtime.compile`: the training step compiles as one graph per shape, and stays compiled."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from granvit.engine import StepInputs  # noqa: E402
from parity.fixture import make_fixture, random_batch  # noqa: E402
from pt_granvit.engine import Engine  # noqa: E402


@torch._dynamo.config.patch(recompile_limit=1)  # the engine must raise it: two graphs for each bucket
def test_steps_of_other_counts_rates_and_shapes_compile_one_graph_for_each_shape(monkeypatch):
    fixture = make_fixture(0)
    config = fixture.config("stage1")
    data = config.data.model_copy(update={"buckets": 2 * config.data.buckets})
    config = config.model_copy(update={"data": data})
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))  # inductor takes minutes
    runs = {}
    for compiled in (True, False):
        own = config.model_copy(update={"runtime": config.runtime.model_copy(update={"compile": compiled})})
        runs[compiled] = Engine(own, fixture.vision, fixture.language, fixture.weights.items())
    torch.compiler.reset()
    first = fixture.batches[0]
    rows, length = first.token_ids_BS.shape
    sizes = rows, first.boxes_BK4.shape[1], length + 8, first.answer_positions_BA.shape[1]
    longer = random_batch(fixture.vision, fixture.language, *sizes, (0, 9), config.crop_size(fixture.vision))
    for step, batch in enumerate([first, longer, *fixture.batches[1:3], longer], start=1):
        inputs = StepInputs(step, 0.01 / step, 0.9 + 0.01 * step, 20.0 + step, 3.0 + step)
        with torch.compiler.set_stance("default" if step <= 2 else "fail_on_recompile"):
            found, held_out = runs[True].step([batch], inputs), runs[True].loss_sums([batch])
        np.testing.assert_allclose(list(vars(found).values()), list(vars(runs[False].step([batch], inputs)).values()), rtol=1e-6)
        np.testing.assert_allclose(held_out, runs[False].loss_sums([batch]), rtol=1e-6)
