"""Joins the units of a build into its stores. Shards are linked, not copied.

Duplicates are found over all units. A unit with duplicates is written once more without them, beside the first result, in a
folder whose name says which images were left out.
"""
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from granvit.checkpoint.tensors import write_synced
from granvit.data.gran.config import BuildConfig
from granvit.data.gran.duplicates import find_duplicates
from granvit.data.gran.make_unit import COUNTS, FINGERPRINTS, Counts, read_counts
from granvit.data.gran.units import Unit, whole_folder
from granvit.data.leakage import FINGERPRINT
from granvit.data.records import ImageRecord
from granvit.data.store import REGIONS, read_shards
from granvit.data.store_writer import REFUSED, StoreWriter, join_stores
from granvit.logs import log

DUPLICATE = "image: duplicate of another one"
BUILT = "build.json"


def check_stores(config: BuildConfig, out: Path) -> None:
    """`ValueError` if a store of the build would replace a folder of another kind, or a store that has more sources."""
    stores: dict[str, set[str]] = {}
    for name, source in config.sources.items():
        stores.setdefault(source.store, set()).add(name)
    for store, sources in stores.items():
        path = out / store
        if path.exists() and not (path / BUILT).exists():
            raise ValueError(f"{path}: is there and is not a store of a build; give another --out, or the store another name")
        built = json.loads((path / BUILT).read_text())["sources"] if path.exists() else {}
        if left_out := [source for source in built if source not in sources]:
            raise ValueError(
                f"{path}: was built from {', '.join(left_out)} too, which this build leaves out. Give another --out for a part "
                f"of the sources; or remove {path}, if it shall be replaced"
            )


def duplicates_of(config: BuildConfig, units: Sequence[Unit]) -> dict[Path, np.ndarray]:
    """For each unit's folder the indices of its images that are duplicates of images before them, int64, ascending. Warns of
    sources of which the filters left no image."""
    prints = [_fingerprints(unit.folder) for unit in units]
    sizes = [len(own) for own in prints]
    left = {unit.source for unit, size in zip(units, sizes, strict=True) if size}
    for name in config.sources:
        if name not in left:
            reasons = sum((read_counts(unit.folder).images_dropped for unit in units if unit.source == name), Counter[str]())
            log.warning(f"sources.{name}: no image is left; dropped: {dict(reasons.most_common(5))}")
    rules = [config.sources[unit.source].duplicates for unit in units]
    exact, near = (np.repeat(np.array([getattr(rule, kind) for rule in rules], bool), sizes) for kind in ("exact", "near"))
    found = find_duplicates(np.concatenate([np.zeros(0, FINGERPRINT), *prints]), exact, near)
    ends = np.cumsum(sizes)
    return {unit.folder: np.flatnonzero(found[end - size : end]) for unit, size, end in zip(units, sizes, ends, strict=True)}


def _fingerprints(folder: Path) -> np.ndarray:
    found, images = np.fromfile(folder / FINGERPRINTS, FINGERPRINT), read_counts(folder).images_written
    if len(found) != images:
        raise ValueError(f"{folder}: has {len(found)} fingerprints of {images} images; remove this folder and start again")
    return found


def kept_folder(folder: Path, duplicates: np.ndarray) -> Path:
    """The folder of a unit's result without its duplicates."""
    if not len(duplicates):
        return folder
    return folder.with_name(f"{folder.name}-without-{hashlib.sha256(duplicates.tobytes()).hexdigest()[:12]}")


def leave_out(folder: Path, duplicates: np.ndarray, shard_bytes: int) -> None:
    """Writes a unit's result without its duplicates, unless that is done. The folder appears complete or not at all."""
    kept = kept_folder(folder, duplicates)
    if kept.exists():
        return
    with whole_folder(kept) as partial:
        writer, counts, dropped = StoreWriter(partial, REGIONS, shard_bytes), Counts(), set(duplicates.tolist())
        if (folder / REFUSED).exists():
            with open(folder / REFUSED) as refused:
                for line in refused:
                    writer.refuse(**json.loads(line))
        manifest = json.loads((folder / "manifest.json").read_text())
        for number, record in enumerate(read_shards([(folder / shard["file"], shard["images"]) for shard in manifest["shards"]])):
            assert isinstance(record, ImageRecord)
            if number not in dropped:
                writer.add(record)
                counts.written(record)
            else:
                writer.refuse(record.id, DUPLICATE)
        writer.finish("image")
        before = read_counts(folder)
        for name in ("records_read", "regions_read", "regions_found", "globals_dropped", "reencoded"):
            setattr(counts, name, getattr(before, name))
        counts.images_dropped = before.images_dropped + Counter({DUPLICATE: len(dropped)})
        lost = before.regions_written - counts.regions_written
        counts.regions_dropped = before.regions_dropped + Counter({f"image left out: {DUPLICATE}": lost})
        counts.check()
        write_synced(partial / COUNTS, json.dumps(vars(counts), indent=1) + "\n")


def join_store(config: BuildConfig, name: str, units: Sequence[Unit], folders: Mapping[Path, Path], out: Path) -> Path:
    """Joins the units of a store, in their order, into OUT/NAME, unless it is joined from the same ones. `folders`: unit's folder
    -> `kept_folder`. `ValueError` if no image is left, with the reasons."""
    own = [unit for unit in units if config.sources[unit.source].store == name]
    counts: dict[str, Counts] = {}
    for unit in own:
        counts.setdefault(unit.source, Counts()).add(read_counts(folders[unit.folder]))
    parts = [folders[unit.folder] for unit in own]
    tree = {
        "units": [str(part.relative_to(out)) for part in parts],
        "sources": {source: vars(found) for source, found in counts.items()},
    }
    text, store = json.dumps(tree, indent=1) + "\n", out / name
    if (store / BUILT).exists() and (store / BUILT).read_text() == text:
        return store
    if not any(found.images_written for found in counts.values()):
        reasons = sum((found.images_dropped for found in counts.values()), Counter())
        raise ValueError(f"store {store}: no image is left; dropped: {dict(reasons.most_common(5))}")
    with whole_folder(store) as partial:
        join_stores(parts, [f"{unit.source}-{unit.number:06d}" for unit in own], partial)
        write_synced(partial / BUILT, text)
        if store.exists():  # of other settings
            shutil.rmtree(store)
    return store
