"""`scripts/bench.py kernels` at tiny shapes: which rows its table has, and whether wrong results show in it."""
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

mindspore = pytest.importorskip("mindspore")  # before torch (parity/check.py)
torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import bench_kernels  # noqa: E402
from bench_kernels import COMPOSED, Line, Shape, Time, roi  # noqa: E402

import ms_granvit.ops.activations  # noqa: E402
import ms_granvit.ops.table  # noqa: E402
import pt_granvit.ops.activations  # noqa: E402
import pt_granvit.ops.table  # noqa: E402
from granvit.kernels import ANY, OPERATORS, Row  # noqa: E402

TABLES = {"torch": pt_granvit.ops.table, "mindspore": ms_granvit.ops.table}
FLOAT32 = {"torch": torch.float32, "mindspore": mindspore.float32}
SHAPES = (
    Shape("roi_align", roi(2, 6, 8, 3, 2)),
    Shape("attention", {"B": 1, "N": 2, "G": 2, "S": 17, "D": 8, "prefix": 0, "K": 0}),
    Shape("attention", {"B": 2, "N": 4, "G": 2, "S": 20, "D": 8, "prefix": 7, "K": 3}),
    Shape("layer_norm", {"rows": 5, "C": 16}),
    Shape("rms_norm", {"rows": 5, "C": 16}),
    Shape("rope", {"B": 2, "N": 2, "S": 5, "D": 8}),
    Shape("swiglu", {"rows": 3, "C": 16}),
    Shape("gelu", {"rows": 3, "C": 16}),
    Shape("cross_entropy", {"A": 5, "C": 12, "V": 31}),
    Shape("adamw", {"numbers": 50}, checked={"numbers": 9}),
)
PLANTED = (  # the values of quick GELU are not those of GELU; `halved` has a wrong gradient; the last one does not load
    Row("gelu", "wrong", ANY, ANY, "ops.activations.quick_gelu", by_name="planted"),
    Row("swiglu", "halved", ANY, ANY, "ops.activations.halved", by_name="planted"),
    Row("rope", "absent", ANY, ANY, "ops.absent.rope", by_name="planted"),
)


def halved_torch(gate, up):
    return torch.nn.functional.silu((gate + gate.detach()) / 2) * up


def halved_mindspore(gate, up):
    return mindspore.ops.silu((gate + mindspore.ops.stop_gradient(gate)) / 2) * up


@pytest.fixture(scope="module")
def measured():
    """The rows and the printed text, without processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt_granvit.ops.activations, "halved", halved_torch, raising=False)
        patch.setattr(ms_granvit.ops.activations, "halved", halved_mindspore, raising=False)
        for module in TABLES.values():
            patch.setattr(module, "TABLE", (*module.TABLE, *PLANTED))
        patch.setattr(bench_kernels, "alone", lambda with_threads, framework, function, *rest: function(*rest))
        patch.setattr(bench_kernels, "PRODUCT", 64)
        patch.setattr(bench_kernels, "COPIED", 1 << 16)
        patch.setattr(bench_kernels, "SHORTEST", 1e-9)
        threads, text = torch.get_num_threads(), io.StringIO()
        torch.set_num_threads(1)  # arrays this small gain nothing by more
        lines = bench_kernels.kernels(Console(file=text, width=130), 1, (SHAPES[:3], SHAPES[3:]))
        torch.set_num_threads(threads)
        return lines, text.getvalue()


def test_every_implementation_that_runs_here_has_a_row_for_every_shape(measured):
    lines, text = measured
    peers = {("torch", "roi_align"): ["torch gather"], ("mindspore", "roi_align"): ["ops.ROIAlign"]}
    planted = {row.operator: [row.name] for row in PLANTED}
    assert {shape.operator for shape in SHAPES} == set(OPERATORS)
    for framework, module in TABLES.items():
        for shape in SHAPES:
            call = bench_kernels.make_call(shape)
            kernels = module.kernels_for("cpu", FLOAT32[framework])
            runnable = kernels.runnable(shape.operator, **call.sizes)
            expected = {*runnable, *peers.get((framework, shape.operator), ()), *planted.get(shape.operator, ())}
            of_shape = [x for x in lines if (x.framework, x.operator, x.label) == (framework, shape.operator, call.label)]
            assert sorted(x.implementation for x in of_shape) == sorted(expected)
            assert sum(x.auto for x in of_shape) == 1
            assert all(f" {x.label} " in text and f" {x.implementation} " in text for x in of_shape)
    assert "…" not in text


def test_right_implementations_have_errors_of_rounding(measured):
    lines, _ = measured
    for line in lines:
        if line.implementation not in ("wrong", "halved", "absent"):
            assert not line.failure, line
            assert line.value_error < 100, line
            assert line.forward.seconds > 0 and (line.both is None) == (line.gradient_error is None) == (line.operator == "adamw")
            assert line.gradient_error is None or line.gradient_error < 100, line


@pytest.mark.parametrize("framework", TABLES)
def test_a_wrong_implementation_shows_in_the_errors_and_one_that_fails_says_why(measured, framework):
    lines, text = measured
    wrong, halved, absent = (
        next(x for x in lines if (x.framework, x.implementation) == (framework, row.name)) for row in PLANTED
    )
    assert wrong.value_error > 1e4 and wrong.gradient_error > 1e4
    assert halved.value_error < 100 and halved.gradient_error > 1e6
    assert "absent" in absent.failure and absent.forward is None
    assert f"{framework} rope [2, 2, 5, 8] absent: ModuleNotFoundError" in text


def test_slow_calls_are_made_once_and_the_others_in_turns(monkeypatch):
    now, made = [0.0], []
    monkeypatch.setattr(bench_kernels.time, "perf_counter", lambda: now[0])

    def call(name, *seconds):
        durations = iter(seconds)

        def run():
            made.append(name)
            now[0] += next(durations)

        return run

    found = bench_kernels.timed({"slow": call("slow", 3.0), "a": call("a", 1, 0.5, 0.9, 0.6), "b": call("b", 1, 1, 1, 1)}, 3)
    assert made == ["slow", "a", "b", *"abab", *"ab"]
    assert found == {"slow": Time(3.0, True), "a": Time(pytest.approx(0.6), False), "b": Time(pytest.approx(1), False)}
    assert [str(x) for x in (found["slow"], Time(0.00123, False))] == ["3000 1x", "1.23"]


def test_errors_are_relative_and_the_worst_counts():
    exact = [np.array([3.0, 4.0]), np.array(2.0)]
    found = [np.array([3.0, 4.0], np.float32), np.array(2 + 2.0**-20, np.float32)]
    assert bench_kernels.error_units(found, exact) == pytest.approx(8)
    found[0][1] = np.nan
    assert bench_kernels.error_units(found, exact) == math.inf


def test_speeds_and_shares_of_the_limit_follow_from_the_times():
    """1e9 FLOPs at 1e11 a second take 10 ms, 1e6 bytes at 1e9 a second take 1 ms."""
    composed = Line("torch", "gelu", "", COMPOSED, True, (1e9, 3e9), (1e6, 2e6), "", Time(0.1, False), Time(0.2, False), 1.0, 2.0)
    other = replace(composed, implementation="other", forward=Time(0.025, False), both=Time(0.4, True))
    assert bench_kernels.figures(other, composed, 1e11, 1e9) == ("25.00", "400 1x", "4.00/0.50", "1.00/2.00", "40%/8%")
    assert bench_kernels.figures(replace(other, gradient_error=1.68e7), composed, 1e11, 1e9)[3] == "1.00/2e+07"
    bound_by_memory = replace(other, flops=(0.0, 0.0))
    assert bench_kernels.figures(bound_by_memory, composed, 1e11, 1e9)[-1] == "4%/0%"
