"""Builds region stores from public data, as a configuration says: reads, annotates, filters, and accounts for every image.

    python scripts/build_gran.py --config configs/gran29m.yaml
    mpiexec -n 64 python scripts/build_gran.py --config configs/gran29m.yaml

The result does not depend on the number of processes. mpiexec is that of the package mpich, beside python; it needs no flags. The
same command continues an interrupted build, also after kill -9.
OUT gets a folder for each store (docs/data.md), mixes/ with what stages take as data.sources, and report.md and report.html.
"""
import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from granvit.config import find_config
from granvit.data.annotate.annotator import Annotator
from granvit.data.gran.config import BuildConfig, read_build
from granvit.data.gran.join import check_stores, duplicates_of, join_store, kept_folder, leave_out
from granvit.data.gran.make_unit import make_unit
from granvit.data.gran.mixes import write_mixes
from granvit.data.gran.ranks import Ranks
from granvit.data.gran.report import write_report
from granvit.data.gran.token_counts import count_tokens, stage_chats
from granvit.data.gran.units import Part, Unit, all_units, parts_to_read, read_part, remove_partials
from granvit.data.store_writer import check_links
from granvit.exit_status import exit_status
from granvit.launch import RunLock, detect_launch
from granvit.logs import log, to_console

Task = TypeVar("Task")
_EVERY = 10.0  # seconds between two lines of progress
_FINISHED = 0.05  # seconds within which a task that was finished before is passed over


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a build's configuration, such as configs/gran29m.yaml")
    parser.add_argument("--sources", metavar="NAME", nargs="+", help="only these sources of it (default: all)")
    parser.add_argument("--out", metavar="DIR", help="directory (default: the configuration's `out`)")
    options = parser.parse_args(arguments)
    ranks: list[Ranks] = []

    def body() -> None:
        to_console(0)  # for an error in the next line
        ranks.append(Ranks())
        to_console(ranks[0].rank)
        _build(options, ranks[0])

    status = exit_status(body, [])
    if status and ranks:
        ranks[0].end_all(status)
    return status


def _build(options: argparse.Namespace, ranks: Ranks) -> None:
    config = read_build(find_config(options.config))
    if options.sources:
        config = only(config, options.sources)
    out = Path(options.out or config.out)
    lock = RunLock(out, detect_launch()) if ranks.rank == 0 else None
    ranks.barrier()
    try:
        build(config, out, ranks)
    finally:
        if lock is not None:
            lock.release()


def only(config: BuildConfig, names: Sequence[str]) -> BuildConfig:
    """The configuration with these sources alone. `ValueError` names one that it does not have."""
    if unknown := [name for name in names if name not in config.sources]:
        raise ValueError(f"--sources {unknown[0]}: no such source; there are {', '.join(config.sources)}")
    kept = {name: source for name, source in config.sources.items() if name in names}
    return config.model_copy(update={"sources": kept})


def build(config: BuildConfig, out: Path, ranks: Ranks) -> list[Path]:
    """Builds the stores of `config` in `out` together with the other ranks; returns their folders."""
    chats = stage_chats(config.stages)
    annotators = config.annotators()
    # Rank 0 looks for all: other ranks would list millions of files again, and could see others on a network file system.
    parts, versions = ranks.from_first(lambda: _begin(config, out, annotators))
    share = partial(_share, ranks, out)
    share("parts read", parts, lambda part: read_part(config, part))
    units = ranks.from_first(lambda: all_units(config, out, versions))
    if ranks.rank == 0:
        _log_replaced(units)
    share("units made", units, lambda unit: make_unit(config, unit, annotators[unit.source]))
    if ranks.rank == 0:
        log.info("looking for duplicates")
    duplicates = ranks.from_first(lambda: duplicates_of(config, units))
    affected = [folder for folder, images in duplicates.items() if len(images)]
    size = config.shard_megabytes << 20
    share("units without duplicates", affected, lambda folder: leave_out(folder, duplicates[folder], size))
    folders = {folder: kept_folder(folder, images) for folder, images in duplicates.items()}
    stores = list(dict.fromkeys(source.store for source in config.sources.values()))
    share("stores joined", stores, lambda name: join_store(config, name, units, folders, out))
    count_tokens(chats, [out / name for name in stores])
    if ranks.rank == 0:
        write_mixes(config, out)
        log.info(f"report: {write_report(config, out).with_suffix('.html')}")
    ranks.barrier()
    return [out / name for name in stores]


def _begin(config: BuildConfig, out: Path, annotators: Mapping[str, Annotator]) -> tuple[list[Part], dict[str, str]]:
    """Checks OUT and returns the parts to be read, and the version of each source's annotators."""
    check_stores(config, out)
    check_links(out)
    remove_partials(out)
    versions = {}
    for name, annotator in annotators.items():
        try:
            versions[name] = annotator.version
        except ValueError as error:
            raise ValueError(f"sources.{name}.annotate: {error}") from None
    return parts_to_read(config, out), versions


def _log_replaced(units: Sequence[Unit]) -> None:
    """Logs which sources are made anew although there are results of theirs."""
    for folder in dict.fromkeys(unit.folder.parent for unit in units):
        name = folder.name.rpartition("-")[0]
        older = [path for path in folder.parent.glob("*") if path.name.rpartition("-")[0] == name and path != folder]
        if older and not folder.exists():
            log.info(
                f"sources.{name} is made anew: its settings, files or annotators are not those of {', '.join(map(str, older))}, "
                f"which can be removed"
            )


def _share(ranks: Ranks, out: Path, what: str, tasks: Sequence[Task], do: Callable[[Task], object]) -> None:
    """Does tasks together with the other ranks, and waits until all are done. Rank 0 logs the progress of all."""
    began = told = time.monotonic()
    done: list[float] = []  # seconds of this rank's tasks that were not finished before
    for number, task in ranks.share(list(enumerate(tasks)), out):  # `number` tasks were taken before, by any rank
        started = time.monotonic()
        if ranks.rank == 0 and started - told > _EVERY and done:
            told, left = started, sum(done) / len(done) * (len(tasks) - number) / ranks.size
            log.info(f"{what}: {number} of {len(tasks)}, about {left / 60:.0f} min left")
        do(task)
        if time.monotonic() - started > _FINISHED:
            done.append(time.monotonic() - started)
    if ranks.rank == 0:
        log.info(f"{what}: {len(tasks)}, {time.monotonic() - began:.0f} s")
