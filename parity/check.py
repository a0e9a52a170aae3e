"""Checks that the MindSpore model and the PyTorch model compute the same: every layer forward and backward, the optimizer, many
training steps. `--faults` tests the check itself with planted faults. `python parity/check.py --help`.

Exit status: 0 equal, 1 diverged, 2 could not tell.
"""
import argparse
import importlib.util
import inspect
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the command works without installation

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from granvit.introspection import INPUTS  # noqa: E402
from granvit.launch import load_engine_class  # noqa: E402
from parity import peers, preconditions, round_trips  # noqa: E402
from parity.capture import Record, Request, compute, kernel_table, load_record, open_model  # noqa: E402
from parity.capture import environment as _versions  # noqa: E402
from parity.compare import ROUNDOFF, Row, compare_records, compare_suite  # noqa: E402
from parity.each_kernel import FRAMEWORKS, Runs, implementations, picks  # noqa: E402
from parity.fault_trials import Trial, false_alarms  # noqa: E402
from parity.faults import FAULTS  # noqa: E402
from parity.fixture import Fixture, make_fixture  # noqa: E402
from parity.options import OPTIONS, coverage, option_fixture  # noqa: E402
from parity.preconditions import CouldNotTell  # noqa: E402
from parity.report import COULD_NOT_TELL, OUTCOME_COLUMNS, Report, outcome, print_report, write_report  # noqa: E402

FREE = ("ops", "vision", "language", "model", "stage1", "stage2", "trajectory", "trajectory2", "generate", "options",
        "checkpoint", "peers")  # fmt: skip
PYNATIVE = ("vision", "language", "model")  # suites that also run in PyNative mode


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    began = time.monotonic()
    try:
        if options.compare:
            report = _compare(*options.compare)
        elif options.record:
            return _record(options, console)
        elif options.each_kernel:
            return _each_kernel(options, console)
        else:
            report = _run(options, console, Runs())
    except (ValueError, CouldNotTell) as error:
        console.print(f"[yellow]could not tell[/]: {error}", highlight=False)
        return COULD_NOT_TELL
    report.seconds = time.monotonic() - began
    sources = made_by(options)
    print_report(report, sources, console)
    write_report(report, sources, options.out)
    console.print(f"{options.out / 'report.html'}, {options.out / 'report.json'}", highlight=False)
    return report.status


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python parity/check.py                                          # everything, on this machine
  python parity/check.py --suite model stage1 --isolate           # some suites, and every module isolated
  python parity/check.py --suite options --option pooled          # one configuration of the options
  python parity/check.py --kernels attention=sdpa rope=composed   # with these implementations
  python parity/check.py --each-kernel                            # with every implementation that this machine has, in turn
  python parity/check.py --faults                                 # test the check with planted faults (long)
  python parity/check.py --record npu --framework mindspore --device Ascend     # on one machine ...
  python parity/check.py --record gpu --framework torch --device cuda           # ... on another ...
  python parity/check.py --compare npu gpu                                      # ... compared anywhere""",
    )  # fmt: skip
    parser.add_argument("--suite", nargs="+", choices=FREE, default=list(FREE), metavar="NAME",
                        help=f"some of: {', '.join(FREE)} (default: all)")  # fmt: skip
    parser.add_argument("--option", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS), metavar="NAME",
                        help=f"configurations of the suite options: some of {', '.join(OPTIONS)} (default: all)")  # fmt: skip
    parser.add_argument("--isolate", action="store_true", help="also feed every module the golden model's input, so that an "
                        "error is attributed to the module that makes it")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="steps of a trajectory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--vision", default="tiny-vision",
                        help="encoder in configs/models, or a YAML file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--language", default="tiny-language",
                        help="decoder in configs/models, or a YAML file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--kernels", nargs="+", default=[], metavar="OPERATOR=NAME", help="implementations to use in place of "
                        "the default ones, for all suites; a framework that does not have one runs `composed`, and so does the "
                        "golden reference. With --faults all others are `composed` too")  # fmt: skip
    parser.add_argument("--each-kernel", action="store_true", help="run once for every implementation that this machine has in "
                        "either framework; a framework that does not have it runs `composed`")  # fmt: skip
    parser.add_argument("--precision", choices=tuple(ROUNDOFF), default="float32",
                        help="compute dtype of both frameworks; the device must support it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--faults", action="store_true", help="plant faults one at a time; each must be detected and located")
    parser.add_argument("--fault", nargs="+", metavar="NAME", help="with --faults: only these faults")
    parser.add_argument("--seeds", type=int, default=50,
                        help="with --faults: number of seeds to run without a fault (default: %(default)s)")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="DIR", help="only run --framework and write its record to DIR")
    parser.add_argument("--framework", choices=("mindspore", "torch"), help="with --record: the framework to run")
    parser.add_argument("--device", default="cpu", help="with --record: cpu, Ascend or npu, cuda (default: %(default)s)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="compare two records")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"),
                        help="directory of report.json and report.html (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.record and not options.framework:
        parser.error("--record needs --framework mindspore or torch")
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.each_kernel and (options.record or options.compare):
        parser.error("--each-kernel runs both frameworks here: leave out --record and --compare")
    for name in options.kernels:
        if name.count("=") != 1:
            parser.error(f"--kernels {name}: write OPERATOR=NAME, as in attention=composed")
    options.kernels = dict(name.split("=") for name in options.kernels)
    return options


def _fixture(options: argparse.Namespace) -> Fixture:
    return make_fixture(options.seed, options.vision, options.language)


def _run(options: argparse.Namespace, console: Console, runs: Runs) -> Report:
    """Both frameworks and the golden reference on this machine: compared, or with planted faults."""
    for framework in FRAMEWORKS:  # MindSpore first: it must be imported before torch's protobuf
        load_engine_class(framework)
        preconditions.check_precision(framework)
    _check_kernels(options.kernels, options.precision)
    return (_faults if options.faults else _check)(options, console, runs)


def _each_kernel(options: argparse.Namespace, console: Console) -> int:
    """`_run` with every implementation in turn, and a line for each; the largest exit status."""
    fixture, runs, sources, statuses = _fixture(options), Runs(), made_by(options), []
    table = Table(title=f"every implementation in turn, {options.precision}; golden reference: PyTorch, float64, composed")
    for column in ("implementation", "MindSpore runs", "PyTorch runs", *OUTCOME_COLUMNS):
        table.add_column(column)
    for operator, name in implementations(fixture, Request((), 1, options.precision)):
        console.print(f"{operator}={name}", highlight=False)
        began, named = time.monotonic(), {**options.kernels, operator: name}
        report = _run(argparse.Namespace(**{**vars(options), "kernels": named}), console, runs)
        report.seconds = time.monotonic() - began
        write_report(report, sources, options.out / f"{operator}-{name}")
        request = Request((), 1, options.precision, kernels=named)
        ran = (picks(framework, fixture, request)[operator] for framework in FRAMEWORKS)
        table.add_row(f"{operator}={name}", *ran, *outcome(report))
        statuses.append(report.status)
    console.print(table)
    console.print(f"{options.out}: a report of each", highlight=False)
    return max(statuses)


def _check(options: argparse.Namespace, console: Console, runs: Runs) -> Report:
    """Compares both frameworks and the golden reference."""
    fixture = _fixture(options)
    of_records = tuple(s for s in options.suite if s not in ("checkpoint", "peers"))
    request = Request(of_records, options.steps, options.precision, options=tuple(options.option), kernels=options.kernels)
    announce = lambda text: console.print(f"[dim]{text}[/]", highlight=False)  # noqa: E731
    announce("golden reference: PyTorch in float64")
    golden = runs.compute(fixture, "torch", replace(request, compute="float64"))
    if options.isolate:
        request = replace(request, suites=(*of_records, "isolated"), golden=_opened_golden(fixture, golden))
        golden.suites |= runs.compute(fixture, "torch", replace(request, suites=("isolated",), compute="float64")).suites
    announce("PyTorch")
    peer = runs.compute(fixture, "torch", request)
    announce("MindSpore, static graph (compiles)")
    candidate = runs.compute(fixture, "mindspore", request)
    preconditions.check_comparable([golden, peer, candidate])
    rows = list(compare_records(golden, peer, candidate))
    eager = tuple(s for s in PYNATIVE if s in of_records)
    if eager:
        announce("MindSpore, PyNative")
        found = runs.compute(fixture, "mindspore", replace(request, suites=eager, graph=False))
        for suite in eager:
            sides = (record.suites[suite] for record in (golden, peer, found))
            rows += compare_suite(f"{suite}, PyNative", *sides, options.precision)
    if "options" in options.suite and not options.each_kernel:
        _print_coverage(console)
    notes = []
    if "checkpoint" in options.suite:
        announce("checkpoints")
        rows += round_trips.rows(fixture)
        notes += round_trips.notes(fixture)
    if "peers" in options.suite:
        announce("transformers, MindFormers")
        rows += peers.rows(fixture, options.precision, options.kernels)
        notes += peers.notes(options.precision)
    return _report(options.precision, rows, candidate, peer, notes)


def _check_kernels(named: Mapping[str, str], precision: str) -> None:
    """`ValueError` for an operator or an implementation that neither framework has, or that neither can run here."""
    for operator, name in named.items():
        rows = [row for framework in FRAMEWORKS for row in kernel_table(framework) if row.operator == operator]
        if name not in {row.name for row in rows}:
            known = ", ".join(sorted({row.name for row in rows})) or "nothing"
            raise ValueError(f"--kernels {operator}={name}: known for {operator}: {known}")
        reasons = [row.unfit("cpu", precision) or row.missing() for row in rows if row.name == name]
        if all(reasons):
            raise ValueError(f"--kernels {operator}={name}: {reasons[0]}; --record and --compare compare other machines")


def _print_coverage(console: Console) -> None:
    """Prints which configurations have each value of each option."""
    rows, covered, all_pairs = coverage()
    table = Table(title="options: the configurations that have each value")
    for column in ("option", "value", "configurations"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{covered} of {all_pairs} pairs of values of two options occur together in a configuration")


def _opened_golden(fixture: Fixture, golden: Record) -> dict[str, np.ndarray]:
    """The golden model's activations and gradients, which are the inputs of the suite `isolated`."""
    if "model" in golden.suites:
        return golden.suites["model"]
    return compute(fixture, "torch", Request(("model",), 1, "float64")).suites["model"]


def _report(precision: str, rows: list[Row], candidate: Record, peer: Record, notes: list[str]) -> Report:
    names = {"mindspore": "MindSpore", "torch": "PyTorch"}
    environment = peer.environment | candidate.environment
    label = lambda record: names[record.framework] + (f" on {record.device}" if record.device != "cpu" else "")  # noqa: E731
    return Report(label(candidate), label(peer), precision, rows, environment, candidate.settings, notes)


def _record(options: argparse.Namespace, console: Console) -> int:
    """Writes one framework's record; PyTorch's includes the golden reference."""
    device = {"ascend": "npu"}.get(options.device.lower(), options.device.lower())
    fixture = _fixture(options)
    suites = tuple(s for s in options.suite if s not in ("checkpoint", "peers"))
    request = Request(suites, options.steps, options.precision, device, options=tuple(options.option), kernels=options.kernels)
    load_engine_class(options.framework)
    preconditions.check_precision(options.framework)
    if (options.record / "record.json").exists():
        raise ValueError(f"{options.record} already holds a record; name another directory")
    compute(fixture, options.framework, request).save(options.record)
    if options.framework == "torch":
        compute(fixture, "torch", replace(request, compute="float64", device="cpu")).save(options.record / "golden")
    console.print(f"{options.record}: {', '.join(suites)} of {options.framework} on {device}", highlight=False)
    return 0


def _compare(a: Path, b: Path) -> Report:
    """Compares two records; PyTorch's includes the golden reference."""
    directories = sorted((a, b), key=lambda path: load_record(path).framework)  # mindspore before torch
    candidate, peer = (load_record(path) for path in directories)
    if peer.framework != "torch":
        raise CouldNotTell("no record is PyTorch's, so there is no golden reference: record one with --framework torch")
    golden = load_record(directories[1] / "golden")
    preconditions.check_comparable([golden, peer, candidate])
    if candidate.compute != peer.compute:
        precisions = f"{directories[0]} is in {candidate.compute}, {directories[1]} in {peer.compute}"
        raise CouldNotTell(f"{precisions}: record both with the same --precision")
    return _report(candidate.compute, list(compare_records(golden, peer, candidate)), candidate, peer, [])


def _faults(options: argparse.Namespace, console: Console, runs: Runs) -> Report:
    """Plants every fault (or those of --fault), then runs seeds without one."""
    names = options.fault or list(FAULTS)
    for name in names:
        if name not in FAULTS:
            raise ValueError(f"--fault {name!r}: no such fault; known: {'; '.join(FAULTS)}")
    trial = Trial(options, runs)
    found = []
    for number, name in enumerate(names):
        result = trial.fault(FAULTS[name])
        console.print(f"[dim]{number + 1}/{len(names)} {name}: {result['first']}[/]", highlight=False)
        found.append(result)
    alarms = false_alarms(options, console) if options.seeds else None
    settings = {"seed": options.seed, "steps": options.steps, "kernels": options.kernels}
    environment = {**_versions("mindspore"), **_versions("torch")}
    return Report("MindSpore", "PyTorch", options.precision, [], environment, settings, faults=found, false_alarms=alarms)


def made_by(options: argparse.Namespace) -> dict[str, str]:
    """For each tensor's name, the class that computes it and its file; both are called the same in both packages."""
    if importlib.util.find_spec("torch") is None:
        return {}
    described = {INPUTS: "GranViT.inputs in model.py"}
    made = [(_fixture(options), "stage1")]
    if "options" in options.suite:
        made += [(option_fixture(options.seed, name), option.stage) for name, option in OPTIONS.items()]
    for fixture, stage in made:
        closed = open_model("torch", fixture, fixture.config(stage), {})
        for prefix, root in (("", closed.engine.model), ("teacher.", closed.engine.teacher)):
            for path, module in () if root is None else root.named_modules():
                text = f"{type(module).__name__} in {Path(inspect.getfile(type(module))).name}"
                described.setdefault(prefix + path, text)
                for name, _ in module.named_parameters(recurse=False):
                    described.setdefault(f"{prefix}{path}.{name}", text)
    return described


if __name__ == "__main__":
    sys.exit(main())
