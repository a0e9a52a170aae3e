"""The check itself, on the tiny models: equal models pass, faults are detected and located, incomparable records are refused."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from granvit.kernels import COMPOSED
from parity import check, each_kernel, peers
from parity.capture import Record, Request, compute, load_record
from parity.compare import compare_records
from parity.each_kernel import FRAMEWORKS, Runs, implementations, picks
from parity.fault_trials import Trial, kernels_beside
from parity.faults import FAULTS
from parity.fixture import make_fixture
from parity.options import option_suite
from parity.preconditions import CouldNotTell, check_comparable, check_deterministic
from parity.report import Report

pytest.importorskip("mindspore")
pytest.importorskip("torch")
pytest.importorskip("transformers")
SUITES = ("vision", "language", "model", "stage1", "generate")
CONFIGURATIONS = ("pooled", "tiled")  # two of the six options
PLANTED = (  # seven of the command's faults; none needs the compilation of a whole model
    "a cell for the mean of its neighbours",
    "tiles in columns for tiles in rows",
    "RoPE in interleaved layout",
    "AdamW without bias correction",
    "a square weight transposed in conversion",
    "GELU exact for tanh",
    "ROIAlign without the half pixel, in MindSpore",
)


@pytest.fixture(scope="module")
def sides():
    """The records of the golden reference, of PyTorch and of MindSpore, with the isolated suite."""
    fixture = make_fixture(0)
    golden = compute(fixture, "torch", Request((*SUITES, "options"), 3, "float64", options=CONFIGURATIONS))
    request = Request((*SUITES, "options", "isolated"), 3, golden=golden.suites["model"], options=CONFIGURATIONS)
    golden.suites |= compute(fixture, "torch", Request(("isolated",), 3, "float64", golden=golden.suites["model"])).suites
    return golden, compute(fixture, "torch", request), compute(fixture, "mindspore", request)


def test_the_twins_are_one_model(sides):
    rows = list(compare_records(*sides))
    of_options = {f"option {name}{step}" for name in CONFIGURATIONS for step in ("", ", step", ", empty step")}
    assert {row.suite for row in rows} == {*SUITES, *of_options, "isolated"} and len(rows) > 1000
    assert [f"{row.suite} {row.kind}/{row.name}: {row.reason} {row.error}" for row in rows if not row.passed] == []


def test_every_named_activation_and_parameter_is_compared(sides):
    golden = sides[0]
    fixture = make_fixture(0)
    names = list(golden.suites["model"])
    shapes = fixture.shapes(fixture.config("stage1"))
    assert [n.removeprefix("forward/") for n in names if n.startswith("forward/")] == list(shapes)
    assert {n.removeprefix("gradient/") for n in names if n.startswith("gradient/")} == set(fixture.weights)
    with_gradient = {n.removeprefix("backward/") for n in names if n.startswith("backward/")}
    assert with_gradient == {n for n in shapes if not n.startswith("teacher.")}
    assert all(array.any() for name, array in golden.suites["model"].items() if "k_proj.bias" not in name)


def test_an_isolated_module_answers_for_itself_alone(sides):
    """A wrong GELU in the encoder's MLPs makes many activations of the suite `model` fail, but only these MLPs in `isolated`."""
    golden, peer, _ = sides
    request = Request(("model", "isolated"), 1, golden=golden.suites["model"], fault="GELU exact for tanh")
    wrong = compute(make_fixture(0), "torch", request)
    failing = {suite: [r.name for r in compare_records(_only(golden, suite), _only(peer, suite), _only(wrong, suite))
                       if not r.passed and r.kind == "forward"] for suite in request.suites}  # fmt: skip
    assert len(failing["model"]) > 40
    assert set(failing["isolated"]) == {f"{part}encoder.layers.{i}.mlp" for part in ("vision.", "teacher.") for i in range(2)}


def _only(record, suite):
    return replace(record, suites={suite: record.suites[suite]})


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_placed(name, trial):
    result = trial.fault(FAULTS[name])
    assert result["detected"], "not noticed"
    assert result["located"], f"expected {result['expected']}, named {result['first']}"


@pytest.fixture(scope="module")
def trial(sides):
    """Trials that reuse the records of `sides` as their records without a fault."""
    runs = Runs()
    anew, (golden, peer, candidate) = runs.compute, sides

    def reuse(fixture, framework, request):
        record = {("torch", "float64"): golden, ("torch", "float32"): peer, ("mindspore", "float32"): candidate}
        wanted = set(map(option_suite, request.options)) if request.suites == ("options",) else set(request.suites)
        reused = request.fault is None and wanted <= set(golden.suites)
        return record[framework, request.compute] if reused else anew(fixture, framework, request)

    runs.compute = reuse
    return Trial(SimpleNamespace(seed=0, language="tiny-language", precision="float32", kernels={}), runs)


def test_there_are_thirty_faults_ten_of_them_in_mindspore_and_none_is_left_switched_on():
    assert len(FAULTS) >= 30 and sum(f.framework == "mindspore" for f in FAULTS.values()) >= 10
    import ms_granvit.layers
    import pt_granvit.layers
    import pt_granvit.optimizer

    before = [pt_granvit.layers.Linear.forward, pt_granvit.optimizer.AdamW.step, ms_granvit.layers.LayerNorm.__init__]
    for fault in FAULTS.values():
        with fault.plant():
            pass
    assert before == [pt_granvit.layers.Linear.forward, pt_granvit.optimizer.AdamW.step, ms_granvit.layers.LayerNorm.__init__]


def test_records_survive_the_disk_and_are_judged_there(sides, tmp_path, capsys):
    golden, peer, candidate = sides
    golden.save(tmp_path / "gpu" / "golden")
    peer.save(tmp_path / "gpu")
    candidate.save(tmp_path / "npu")
    again = load_record(tmp_path / "npu")
    assert list(again.suites["model"]) == list(candidate.suites["model"])
    np.testing.assert_array_equal(again.suites["model"]["loss/loss"], candidate.suites["model"]["loss/loss"])
    out = tmp_path / "out"
    assert check.main(["--compare", str(tmp_path / "gpu"), str(tmp_path / "npu"), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["outcome"] == "equal" and report["schema"] == 1 and len(report["rows"]) > 500
    with pytest.raises(ValueError, match="never overwritten"):
        candidate.save(tmp_path / "npu")


def test_what_cannot_be_compared_is_refused_with_exit_status_2(sides, tmp_path, capsys):
    golden, peer, candidate = sides
    golden.save(tmp_path / "gpu" / "golden")
    peer.save(tmp_path / "gpu")
    replace(candidate, settings={**candidate.settings, "weights": "other"}).save(tmp_path / "npu")
    assert check.main(["--compare", str(tmp_path / "gpu"), str(tmp_path / "npu")]) == 2
    assert "start weights" in capsys.readouterr().out
    assert check.main(["--compare", str(tmp_path / "gpu"), str(tmp_path / "none")]) == 2
    manifest = tmp_path / "npu" / "record.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 9'))
    assert check.main(["--compare", str(tmp_path / "gpu"), str(tmp_path / "npu")]) == 2
    assert "schema 9" in capsys.readouterr().out
    (tmp_path / "gpu" / "model.safetensors").write_bytes(b"no")
    assert check.main(["--compare", str(tmp_path / "gpu"), str(tmp_path / "npu")]) == 2
    with pytest.raises(CouldNotTell, match="batches"):
        check_comparable([golden, replace(peer, settings={**peer.settings, "batches": "x"})])
    with pytest.raises(CouldNotTell, match="randomness"):
        check_deterministic("torch", {"forward/a": np.zeros(2)}, {"forward/a": np.ones(2)})


def test_the_peers_agree():
    """transformers' SigLIP and Qwen2 against both packages; MindFormers' Llama, in a separate process, against MindSpore's."""
    rows = list(peers.rows(make_fixture(0), "float32", {}))
    asked = {"peers"} if peers.without_mindformers("float32") else {"peers", "mindformers"}
    assert {row.suite for row in rows} == asked and len(rows) >= 5
    assert [f"{row.suite} {row.kind}/{row.name}: {row.reason} {row.error}" for row in rows if not row.passed] == []
    assert any("float32" in note for note in peers.notes("bfloat16"))


def test_a_named_kernel_runs_where_it_exists_and_composed_elsewhere_and_in_the_reference():
    fixture = make_fixture(0)
    found = list(implementations(fixture, Request((), 1)))
    assert {("attention", "composed"), ("attention", "sdpa"), ("rms_norm", "product"), ("cross_entropy", "chunked")} <= set(found)
    for operator, name in found:
        request = Request((), 1, kernels={operator: name})
        ran = {framework: picks(framework, fixture, request)[operator] for framework in FRAMEWORKS}
        assert name in ran.values() and set(ran.values()) <= {name, COMPOSED}
        assert set(picks("torch", fixture, replace(request, compute="float64")).values()) == {COMPOSED}


def test_what_ran_already_is_not_computed_again(monkeypatch):
    computed, fixture, runs = [], make_fixture(0), Runs()

    def stand_in(fixture, framework, request):
        computed.append((framework, request.kernels, request.compute))
        return Record(framework, "cpu", request.compute, {}, {})

    monkeypatch.setattr(each_kernel, "compute", stand_in)
    for name in ("composed", "sdpa"):
        request = Request((), 1, kernels={"attention": name})
        for framework, dtype in (("torch", "float64"), ("torch", "float32"), ("mindspore", "float32")):
            found = runs.compute(fixture, framework, replace(request, compute=dtype))
            assert found.settings["kernels"] == {"attention": name}
    assert [framework for framework, *_ in computed] == ["torch", "torch", "mindspore", "torch"]  # only PyTorch has `sdpa`


def test_each_kernel_gets_a_line_and_the_worst_decides(monkeypatch, tmp_path, capsys):
    def stand_in(options, console, runs):
        fault = dict.fromkeys(("name", "framework", "suite", "expected", "first"), "x")
        faults = [{**fault, "detected": True, "located": options.kernels != {"attention": "sdpa"}}]
        return Report("MindSpore", "PyTorch", "float32", [], {}, {}, faults=faults)

    monkeypatch.setattr(check, "_run", stand_in)
    assert check.main(["--each-kernel", "--suite", "ops", "--out", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "faults located" in line]
    assert sum("0 of 1" in line and "attention=sdpa" in line for line in lines) == sum("0 of 1" in line for line in lines) == 1
    assert json.loads((tmp_path / "attention-composed" / "report.json").read_text())["outcome"] == "equal"
    with pytest.raises(SystemExit):
        check.main(["--each-kernel", "--record", str(tmp_path)])


def test_a_fault_of_a_composed_operator_is_tried_with_it():
    named = {"rope": "native", "attention": "native"}
    beside = kernels_beside(FAULTS["RoPE in interleaved layout"], named)
    assert (beside["rope"], beside["attention"], beside["gelu"]) == (COMPOSED, "native", COMPOSED)
    targets = {fault.operator for fault in FAULTS.values()}
    assert {"attention", "roi_align", "rms_norm", "rope", "gelu", None} == targets


def test_unknown_models_and_faults_end_in_one_line(capsys):
    assert check.main(["--vision", "tiny-vison", "--suite", "ops"]) == 2
    assert "did you mean 'tiny-vision'" in capsys.readouterr().out.replace("\n", " ")
    assert check.main(["--faults", "--fault", "nothing"]) == 2
