"""Check 8: one training step of each stage on parity's tiny model, and the loss on a device against the CPU's."""
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from granvit.models import part_of
from granvit.stages import STAGES, WITH_SCRIPTS
from parity.capture import make_engine
from parity.compare import FLOOR_UNITS, ROUNDOFF
from parity.fixture import make_fixture
from selftest.calls import Side
from selftest.operators import Check
from selftest.rows import FAILED, PASSED, Row, verdict

TRAINING = "training"
# A loss went through the whole model: as parity does, its error may be this many times that of one operator.
CARRIED = 8.0


def groups() -> list[tuple[str, ...]]:
    """The stages that have a command; those that train the same with the same losses are one step."""
    found: dict[tuple, list[str]] = {}
    for name in WITH_SCRIPTS:
        stage = STAGES[name]
        found.setdefault((stage.trains, stage.distill, stage.zero_image_tokens), []).append(name)
    return [tuple(names) for names in found.values()]


def checks(side: Side, names: Sequence[str]) -> Iterator[Check]:
    yield Check(TRAINING, ", ".join(names), partial(step, side, names))


def step(side: Side, names: Sequence[str]) -> Row:
    """One optimizer step of two micro-batches: the loss is finite, trained tensors change, frozen ones keep their bits."""
    compute = "float32" if side.device == "cpu" else "bfloat16"
    fixture = make_fixture(0)
    config = fixture.config(names[0], compute, side.device)
    engine = make_engine(side.framework, fixture, config)
    before = {name: array.copy() for name, array in engine.tensors("model")}
    batches = fixture.step_batches(1)
    result = engine.step(batches, fixture.step_inputs(1, batches))
    changed = {name: array.tobytes() != before[name].tobytes() for name, array in engine.tensors("model")}
    trained = [name for name in changed if part_of(name) in config.stage_spec.trains]
    problems = [] if np.isfinite(list(vars(result).values())).all() else [f"not finite: {result}"]
    problems += [f"{name} did not change" for name in trained if not changed[name]]
    problems += [f"{name} is frozen and changed" for name in changed if changed[name] and name not in trained]
    note = "; ".join(problems[:5]) or f"{len(trained)} tensors trained, {len(changed) - len(trained)} frozen, {compute}"
    figure = f"loss {result.loss:.6g}"
    kernels = engine.kernels.names
    return Row(TRAINING, ", ".join(names), FAILED if problems else PASSED, figure, "", note,
               details={**vars(result), "kernels": kernels, "problems": problems, "compute": compute})  # fmt: skip


def against_cpu(rows: Iterable[Row], on_cpu: Iterable[Row]) -> list[Row]:
    """The losses of the steps on a device against those on the CPU, in units of the roundoff of the device's dtype."""
    expected = {row.what: row.details.get("loss", math.nan) for row in on_cpu if row.check == TRAINING}
    found = []
    for row in rows:
        if row.check == TRAINING and "loss" in row.details:
            dtype, loss = row.details["compute"], expected.get(row.what, math.nan)
            error = abs(row.details["loss"] - loss) / abs(loss) / ROUNDOFF[dtype]
            limit = CARRIED * FLOOR_UNITS[dtype][0]
            made = verdict("loss, CPU", row.what, error, limit, f"{loss:.6g} on the CPU in float32")
            found.append(replace(made, framework=row.framework))
    return found
