"""Compares settings over seeds, as a grid file describes them: trains every cell, and writes a table, plots and verdicts.

    python scripts/ablate.py configs/ablations/table3.yaml --framework torch

The same command continues an interrupted grid; finished runs are not repeated. Runs that several cells, or several grids, have in
common are trained once. docs/ablations.md says how to write a grid file.
"""
import argparse
import importlib
import shlex
import signal
import sys
from pathlib import Path

from granvit.ablation.grid import Cell, check_tasks, compared_stores, expand, naming, read_grid
from granvit.ablation.machine import Machine, this_machine
from granvit.ablation.run_cells import Launching, finished_seconds, run_cells, unique_runs
from granvit.checkpoint.run import Checkpoint, newest_checkpoint
from granvit.config import find_config
from granvit.data.batch import Packer
from granvit.data.leakage import check_leakage
from granvit.data.store import Store
from granvit.demo.text_maps import compose_text
from granvit.exit_status import exit_status
from granvit.launch import RunLock, detect_launch
from granvit.logs import to_console
from granvit.probe.leakage import not_held_out
from granvit.train import train_command

OUT = Path("runs/ablations")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0, 1 if a cell failed, 2 after a mistake of the user."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["rank"]:  # this process is one rank of a cell's run
        stage = arguments[1]
        compose = compose_text if stage == "pretrain_text" else Packer.row
        return train_command(stage, arguments[2:], compose, f"{sys.argv[0]} rank {stage}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a grid file; configs/ablations/ has those of the paper's tables")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    parser.add_argument("--jobs", type=_count, help="runs at the same time (default: as many as cores or accelerators allow)")
    parser.add_argument("--ranks", type=_count, default=1, help="ranks of each run, under msrun or torchrun (default: 1)")
    parser.add_argument("--out", type=Path, default=OUT,
                        help="directory of all grids (default: %(default)s): runs in OUT/cells, reports in OUT/GRID")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="list cells, their state and commands, and check the held-out images; train nothing")  # fmt: skip
    options = parser.parse_args(arguments)
    to_console(0)
    failures: list[str] = []
    status = exit_status(lambda: failures.extend(_ablate(options)), [])
    return status or int(bool(failures))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return number


def _ablate(options: argparse.Namespace) -> list[str]:
    """Runs the grid and writes its report. Returns the names of the cells that failed."""
    path = find_config(options.grid)
    grid = read_grid(path)
    with naming(path):
        cells = expand(grid, options.framework, options.out, options.ranks)
    runs = unique_runs(cells)
    machine = this_machine(options.framework, runs[0].config.runtime.device if runs else "cpu")
    jobs = options.jobs or machine.jobs(options.ranks)
    launching = Launching(Path(sys.argv[0]).resolve(), options.framework, options.ranks, bind_cores=jobs == 1)
    if options.dry_run:
        _list(cells, launching, machine, jobs)
    elif not runs:
        raise ValueError(f"no cell of {path} can run: {cells[0].name}: {cells[0].problem}")
    else:
        _check_packages()
    with naming(path):
        check_tasks(grid, cells)
        for held_out, sources in compared_stores(cells).items():
            check_leakage(sorted(sources), held_out)
        _check_earlier_runs(cells)
    if options.dry_run:
        return []
    unfinished = [run for run in runs if finished_seconds(run) is None]
    free = machine.slots(jobs, options.ranks) if unfinished else []
    root = options.out / path.stem
    lock = RunLock(root, detect_launch())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children save and end
    failed = run_cells(cells, launching, free)
    problems = {}
    for cell in cells:
        reason = cell.problem or next((f"{run.stage}: {failed[run.key]}" for run in cell.runs if run.key in failed), None)
        if reason is not None:
            problems[cell] = reason
    from granvit.ablation.report import write_report  # imported here: a rank of a run needs neither matplotlib nor scipy
    from granvit.ablation.results import read_scores

    scores, unreadable = read_scores(grid, [cell for cell in cells if cell not in problems])
    problems |= unreadable
    for cell, reason in problems.items():
        print(f"FAILED {cell.name}: {reason}", file=sys.stderr)
    print(write_report(grid, cells, scores, problems, root, path.stem, _as_given(options)))
    print(f"report.md, report.html, results.json and plots were written to {root}")
    lock.release()
    return [cell.name for cell in problems]


def _check_earlier_runs(cells: list[Cell]) -> None:
    """`ValueError` if a run that a cell's first stage starts from, or one before that, was trained on a held-out image, or on
    data that cannot be compared."""
    origins: dict[str, dict[Path, Checkpoint]] = {}  # held-out store -> the checkpoints, by their paths
    for cell in cells:
        origin = cell.runs[0].config.model.init_from if cell.problem is None else None
        if origin is not None:
            source = cell.runs[-1].config.eval.source
            checkpoint = newest_checkpoint(origin)
            assert source is not None and checkpoint is not None  # `expand` has read both
            origins.setdefault(source, {})[checkpoint.path] = checkpoint
    for source, checkpoints in origins.items():
        for path, reasons in not_held_out(checkpoints.values(), Store(source)).items():
            if reasons:
                raise ValueError(f"model.init_from: {path}: {reasons[0]}; name another eval.source")


def _check_packages() -> None:
    """`ValueError`, before hours of training, if a package of the report is missing."""
    try:
        importlib.import_module("granvit.ablation.report")
    except ImportError as error:
        raise ValueError(
            f"the report needs more packages ({error} for {sys.executable}): pip install scipy matplotlib markdown"
        ) from None


def _as_given(options: argparse.Namespace) -> str:
    """The command for the report, with the options that were given."""
    words = ["python", "scripts/ablate.py", str(options.grid), "--framework", options.framework]
    for name, default in (("jobs", None), ("ranks", 1), ("out", OUT)):
        if (value := getattr(options, name)) != default:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _list(cells: list[Cell], launching: Launching, machine: Machine, jobs: int) -> None:
    """--dry-run: every cell with its runs, what is missing, and the command of each run. Runs that this machine has too few
    devices for are for a cluster: their commands are without a launcher."""
    runs = unique_runs(cells)
    for cell in cells:
        chain = " -> ".join(f"{run.directory.name}{'' if finished_seconds(run) is None else ' (finished)'}" for run in cell.runs)
        print(f"{cell.name}: {chain}" + (f" -> cannot run: {cell.problem}" if cell.problem else ""))
    print()
    fits = machine.fits(jobs, launching.ranks)
    if not fits:
        print(f"For {launching.ranks} ranks, which this machine has too few devices for. Put your launcher before each command:")
    for run in runs:
        if finished_seconds(run) is None:
            print(shlex.join(launching.words(run) if fits else launching.own_words(run)))
    unfinished = sum(finished_seconds(run) is None for run in runs)
    print(f"\n{len(cells)} cells, {len(runs)} different runs, {unfinished} of them not finished" + f"; {jobs} at a time" * fits)
