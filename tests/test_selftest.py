"""`scripts/selftest_device.py`: a run on the CPU, and whether wrong kernels, exceptions and processes that die or hang show."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import selftest_device  # noqa: E402
from selftest import calls, child, children, formulas, operators, training  # noqa: E402
from selftest.rows import FAILED, PASSED, Row, table  # noqa: E402

from granvit.engine import StepResult  # noqa: E402
from granvit.kernels import ANY, OPERATORS  # noqa: E402
from granvit.kernels import Row as Kernel  # noqa: E402
from granvit.launch import FRAMEWORKS  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "scripts" / "selftest_device.py")]
FIELDS = {"framework", "check", "what", "result", "figure", "limit", "note", "traceback", "details"}
# Everything takes MindSpore two minutes, most of it for graphs; these are one or more of every kind of check.
SOME = ("versions", "attention native", "attention flash", "rms_norm", "adamw", "speed", "time gelu", "training projector",
        "all-reduce")  # fmt: skip
MASK = "ops.attention.shared_prefix_mask"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize(("framework", "only"), [("torch", ()), ("mindspore", SOME)])
def test_everything_passes_on_the_cpu(framework, only, tmp_path):
    pytest.importorskip(framework)
    path = tmp_path / "found.json"
    done = run("--framework", framework, "--device", "cpu", "--json", path, *(("--only", *only) if only else ()))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    rows = found["rows"]
    assert found["status"] == 0 and all(set(row) == FIELDS for row in rows)
    assert {row["result"] for row in rows} == {"passed", "not here", "noted"}
    assert all(row["note"] for row in rows if row["result"] == "not here")
    kinds = {row["check"] for row in rows}
    assert {"version", "values", "adjoint", "72 as 80", "mask", "speed", "time", "training", "all-reduce"} <= kinds
    assert ("error class" in kinds) == (framework == "torch")
    assert all(row["check"] in done.stdout and row["what"] in done.stdout for row in rows)
    assert all(f"{row['check']} {row['what']}" in done.stderr for row in rows if row["framework"])
    tried = {row["what"].rpartition(" ")[0] for row in rows if row["check"] == "values" and row["result"] == "passed"}
    named = {row["what"] for row in rows if row["check"] == "values" and row["result"] == "not here"}
    kernels = importlib.import_module(f"{FRAMEWORKS[framework][0]}.ops.table").TABLE
    assert tried | named == {name for row in kernels if child.wanted(name := f"{row.operator} {row.name}", only)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--device", "cuda"), "cuda"), (("--only", "nothing"), "nothing"), (("--device", "tpu"), "tpu"),
     (("--json", "/nonexistent/x.json"), "/nonexistent")],
)  # fmt: skip
def test_wrong_usage_has_status_2(arguments, said, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    try:
        status = selftest_device.main(["--framework", "torch", "--json", str(tmp_path / "x.json"), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and said in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def side():
    pytest.importorskip("torch")
    return child.open_side("torch", "cpu")


def outcome(side, operator: str, function, mask: str = "") -> dict[str, Row]:
    """The rows of an implementation, by check."""
    said: list[Row] = []
    kernel = Kernel(operator, "planted", ANY, "float32", "ops.activations.planted", mask=mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("pt_granvit.ops.activations"), "planted", function, raising=False)
        child.run_unit(lambda: operators.checks(side, kernel), lambda row: said.append(Row(**row)))
    return {row.check: row for row in said}


def attend(q, k, v, mask):
    return importlib.import_module("pt_granvit.ops.attention").composed(q, k, v, mask)


def inverted(q, k, v, mask):
    return attend(q, k, v, None if mask is None else ~mask)


def causal_only(q, k, v, mask):
    return attend(q, k, v, None if mask is None else mask.new_ones(mask.shape).tril())


def leaking(q, k, v, mask):
    return attend(q, k, v, mask) + 1e-4 * v.mean((1, 2), keepdim=True)


def scaled_for_72(q, k, v, mask):
    return attend(q * (q.shape[-1] / 72) ** 0.5, k, v, mask)


@pytest.mark.parametrize("wrong", [inverted, causal_only, leaking, scaled_for_72])
def test_a_wrong_mask_or_scale_of_attention_is_noticed(side, wrong):
    found = outcome(side, "attention", wrong, MASK)
    assert found["values"].result == found["mask"].result == FAILED
    if wrong is scaled_for_72:
        assert found["72 as 80"].result == FAILED


def test_an_implementation_that_is_right_passes(side):
    found = outcome(side, "attention", attend, MASK)
    assert {row.result for row in found.values()} == {PASSED} and len(found) == 4


@pytest.mark.parametrize(("operator", "factor"), [("swiglu", 0.5), ("swiglu", 1 + 1e-4), ("roi_align", 1 + 1e-4)])
def test_a_wrong_gradient_is_noticed_twice(side, operator, factor):
    module = {"swiglu": "activations", "roi_align": "roi_align"}[operator]
    right = getattr(importlib.import_module(f"pt_granvit.ops.{module}"), operator)
    scaled = lambda x: factor * x + (1 - factor) * x.detach()  # noqa: E731
    found = outcome(side, operator, lambda x, *rest: right(scaled(x), *rest))
    assert found["values"].result == found["adjoint"].result == FAILED
    assert "backward" in found["values"].note and "forward" not in found["values"].note


def test_an_exception_is_a_failed_row_with_its_first_line_and_the_checks_after_it_go_on(side):
    def function(x):
        raise RuntimeError("the kernel is out of order\nmore")

    found = outcome(side, "gelu", function)
    assert found["values"].result == found["adjoint"].result == FAILED
    assert found["values"].note == "RuntimeError: the kernel is out of order" and "in function" in found["values"].traceback


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_formulas_gradients_are_derivatives_of_their_values(operator):
    for case in calls.known(operator, "float32"):
        if sum(x.size for x in case.call.arrays) <= operators.MOST_NUMBERS:
            assert len(case.gradients) == case.call.differentiate
            assert operators.derivative_gap(operator, case, case.outputs, case.gradients) < operators.ROUNDOFF["float32"]


def test_the_formulas_mask_is_that_of_the_rule():
    seen = formulas.allowed(np.array([[0, 0, 1, 2, -1]]))[0, 0].astype(int)
    assert seen.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]


FAKE = """
import json, os, sys, time
first, out = int(sys.argv[sys.argv.index("--first") + 1]), open(sys.argv[-1], "a", buffering=1)
say = lambda **event: print(json.dumps(event), file=out, flush=True)
names = ["one", "dies", "three", "hangs", "five", "hangs too", "seven"]
say(units=names, device="cpu", devices=1)
for number in range(first, len(names)):
    say(start=number)
    print("about to do", names[number], flush=True)
    if names[number] == "dies":
        os.abort()
    if "hangs" in names[number]:
        time.sleep(1000)
    say(row={"check": "values", "what": names[number], "result": "passed"})
say(end=True)
"""


def test_a_process_that_dies_or_hangs_is_a_failed_row_and_another_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(children, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(children, "SECONDS", 3.0)
    monkeypatch.setattr(selftest_device, "find_spec", lambda name: True)
    status = selftest_device.main(["--framework", "torch", "--json", str(tmp_path / "found.json"), "--only", "some"])
    rows = [row for row in json.loads((tmp_path / "found.json").read_text())["rows"] if row["check"] in ("values", "process")]
    assert status == 1
    assert [(row["what"], row["result"]) for row in rows] == [
        ("one", "passed"), ("dies", "FAILED"), ("three", "passed"), ("hangs", "FAILED"), ("five", "passed"),
        ("hangs too", "FAILED"), ("seven", "not run"),
    ]  # fmt: skip
    assert "SIGABRT" in rows[1]["note"] and "about to do dies" in rows[1]["traceback"] and "3 s" in rows[3]["note"]
    assert "FAILED" in capsys.readouterr().out


def test_a_step_that_changes_frozen_weights_fails(side, monkeypatch):
    class Engine:
        """A step that adds 1 to every weight."""

        def __init__(self, framework, fixture, config):
            self.weights, self.kernels = {name: value.copy() for name, value in fixture.weights.items()}, side.kernels("float32")

        def tensors(self, group):
            yield from self.weights.items()

        def step(self, batches, inputs):
            self.weights = {name: value + 1 for name, value in self.weights.items()}
            return StepResult(1.0, 1.0, 0.0, 1.0, 1.0)

    monkeypatch.setattr(training, "make_engine", Engine)
    row = training.step(side, ("projector",))
    assert row.result == FAILED and "is frozen and changed" in row.note
    assert training.step(side, ("continued", "sft")).result == PASSED


def test_a_loss_that_differs_from_the_cpus_fails():
    losses = {"a": 7.0, "b": 9.5}
    rows = [Row("training", stage, PASSED, details={"loss": loss, "compute": "bfloat16"}) for stage, loss in losses.items()]
    on_cpu = [Row("training", stage, PASSED, details={"loss": 7.01}) for stage in "ab"]
    assert [row.result for row in training.against_cpu(rows, on_cpu)] == [PASSED, FAILED]


def test_the_table_has_every_note():
    rows = [
        Row("values", "a", PASSED, "1.5", "32", "short"),
        Row("values", "b", FAILED, "1", "2", "word " * 60),
        Row("values", "c", "not here", note="reason " * 40),
    ]
    text = table(rows)
    assert text.count("word") == 60 and text.count("reason") == 40 and "1.5     32     short" in text
