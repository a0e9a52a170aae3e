"""Mixes: which questions of a build's stores a stage asks, and exactly how many.

OUT/mixes/NAME.yaml is a list of stores with counts, which a stage takes as `data.sources`. It is a view: which questions they are
follows from the counts and a seed (`granvit.data.draw`), and no record is copied.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from granvit.checkpoint.tensors import write_synced
from granvit.data.draw import available
from granvit.data.gran.config import BuildConfig, MixConfig
from granvit.data.store import Store
from granvit.logs import log
from granvit.stages import REGION_TASKS, RegionTask

FOLDER = "mixes"
_HEAD = "# Written by scripts/build_gran.py."  # files that begin otherwise are not ours, and stay


@dataclass(frozen=True)
class Counted:
    """The counts of a mix: questions by store and task. `missing` has a line for each count that the stores do not have."""

    counts: dict[str, dict[RegionTask, int]]
    missing: tuple[str, ...]


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `weights`, into whole numbers with exactly this sum (the method of largest remainders; of
    equal remainders the first). All are 0 if the weights are."""
    everything = sum(weights)
    if not everything:
        return [0] * len(weights)
    shares = [divmod(total * weight, everything) for weight in weights]
    rest = total - sum(whole for whole, _ in shares)
    order = sorted(range(len(weights)), key=lambda number: -shares[number][1])
    return [whole + (number in order[:rest]) for number, (whole, _) in enumerate(shares)]


def count_mix(mix: MixConfig, stores: Mapping[str, Store]) -> Counted:
    """The number of questions that a mix takes from each store. Where it names more than there are, it takes all."""
    names, missing = list(stores), []
    found = np.zeros((len(names), len(REGION_TASKS)), np.int64)
    for column, task in enumerate(REGION_TASKS):
        wanted = mix.questions.get(task, 0)
        there = [available(stores[name], task) for name in names]
        if isinstance(wanted, dict):
            amounts = [wanted.get(name, 0) for name in names]
            asked = [had if amount == "all" else amount for amount, had in zip(amounts, there, strict=True)]
            missing += [f"questions of {task} of {name}, which is not built here" for name in wanted if name not in stores]
            missing += [
                f"{amount:,} questions of {task} of {name}, which has {had:,}"
                for name, amount, had in zip(names, asked, there, strict=True)
                if amount > had
            ]
        elif wanted == "all":
            asked = there
        else:
            asked = divide(min(wanted, sum(there)), there)
            if wanted > sum(there):
                missing.append(f"{wanted:,} questions of {task}, of which there are {sum(there):,}")
        found[:, column] = np.minimum(asked, there)
    if mix.total is not None or mix.fraction != 1:
        everything = int(found.sum())
        total = round(everything * mix.fraction) if mix.total is None else mix.total
        if total > everything:
            missing.append(f"{total:,} questions in all, of which there are {everything:,}")
        found = np.array(divide(min(total, everything), found.reshape(-1).tolist())).reshape(found.shape)
    tasks = [(column, task) for column, task in enumerate(REGION_TASKS) if task in mix.questions]
    counts = {name: {task: int(found[row, column]) for column, task in tasks} for row, name in enumerate(names)}
    return Counted(counts, tuple(missing))


def write_mixes(config: BuildConfig, out: Path) -> None:
    """Writes OUT/mixes/NAME.yaml for every mix of the configuration, from the finished stores, and removes those of an earlier
    configuration."""
    for file in (out / FOLDER).glob("*.yaml"):
        if file.stem not in config.mixes and file.read_text().startswith(_HEAD):  # of an earlier configuration
            file.unlink()
    if not config.mixes:
        return
    (out / FOLDER).mkdir(exist_ok=True)
    stores = {name: Store(out / name) for name in dict.fromkeys(source.store for source in config.sources.values())}
    for name, mix in config.mixes.items():
        counted = count_mix(mix, stores)
        for line in counted.missing:
            log.warning(f"mix {name}: asks {line}; it takes what is there")
        entries = [{"path": f"../{store}", "count": counts, "draw": mix.draw} for store, counts in counted.counts.items()]
        head = f"{_HEAD} Mix {name!r}: a stage takes it as data.sources=OUT/{FOLDER}/{name}.yaml.\n"
        text = head + "".join(f"# Asked for {line}.\n" for line in counted.missing)
        write_synced(out / FOLDER / f"{name}.yaml", text + yaml.safe_dump({"sources": entries}, sort_keys=False))
