"""Writes a run's checkpoints on rank 0, one tensor in memory at a time (`granvit.checkpoint.run` documents the files)."""
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from granvit.checkpoint.run import FORMAT, Checkpoint, Part, open_checkpoint, open_part, saved_steps, state_digest, step_directory
from granvit.checkpoint.tensors import (
    TensorWriter,
    set_digest,
    sync_directory,
    temp_folder,
    tensor_digest,
    write_set,
    write_synced,
)
from granvit.config import RunConfig
from granvit.engine import Group, TrainEngine
from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes, part_of, vision_shapes


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written to the disk; earlier ones are complete."""


def versions() -> dict[str, str]:
    """The installed versions of the packages that can affect results."""
    names = ("granvit", "numpy", "grain", "tokenizers", "pillow", "safetensors", "ml_dtypes", "mindspore", "torch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointNotSaved(error.errno, f"{what}: {error.strerror}; earlier checkpoints are whole") from error


@dataclass
class CheckpointWriter:
    """Writes one run's checkpoints (rank 0). `start` maps each part to the hash of its start weights in RUN/parts, `fingerprints`
    is the result of `granvit.preflight.fingerprints`."""

    run: Path
    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    start: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trains = self.config.stage_spec.trains
        self.frozen_compared = False
        self.model_shapes = parameter_shapes(self.vision, self.language)
        for folder in ("checkpoints", "parts"):
            (self.run / folder).mkdir(parents=True, exist_ok=True)
            for leftover in (self.run / folder).glob(".tmp-*"):
                shutil.rmtree(leftover)

    def record_start(self, start: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the start weights unchanged and writes each to RUN/parts in its dtype.

        The files are complete when the iterator is exhausted. `CheckpointNotSaved` if they cannot be written.
        """
        what = f"the start weights of {self.run} could not be written"
        with ExitStack() as stack:
            folders, writers = {}, {}
            for part in PARTS:
                with _disk_errors(what):
                    folders[part] = stack.enter_context(temp_folder(self.run / "parts" / f".tmp-{part}-{os.getpid()}"))
                shapes = {n: s for n, s in self.model_shapes.items() if part_of(n) == part}
                writers[part] = stack.enter_context(TensorWriter(folders[part], "model", shapes))
            for name, array in start:
                with _disk_errors(what):
                    writers[part_of(name)].add(name, array)
                yield name, array
            with _disk_errors(what):
                for part, writer in writers.items():
                    self.start[part] = set_digest(writer.finish())
                    into = self.run / "parts" / f"{part}-{self.start[part][:16]}"
                    if not into.exists():  # it does if an earlier start of the run wrote the same bytes
                        sync_directory(folders[part])
                        os.rename(folders[part], into)
                sync_directory(self.run / "parts")

    def save(self, engine: TrainEngine, step: int, counters: dict[str, int], last: bool = False) -> Checkpoint:
        """Writes the state after `step`, then deletes the oldest checkpoints beyond `train.keep_checkpoints`.

        The first call, and that of the run's `last` step, compare the frozen parts with their start weights, which takes a copy
        to the host and a hash of each: `RuntimeError` if one has changed.

        `CheckpointNotSaved` if the checkpoint cannot be written; what was written of it is removed, earlier ones are kept.
        """
        into = step_directory(self.run, step)
        if into.exists():
            return open_checkpoint(into)  # the same step of the same run has the same bytes
        temporary = into.with_name(f".tmp-{into.name}-{os.getpid()}")
        with _disk_errors(f"checkpoint {into} could not be written"), temp_folder(temporary) as folder:
            parts = self._write_model(engine, folder, compare_frozen=last or not self.frozen_compared)
            self._write_rest(engine, folder)
            self._write_state(folder, step, parts, counters, engine.world)
            sync_directory(folder)
            os.rename(folder, into)
            sync_directory(into.parent)
        self._thin()
        return open_checkpoint(into)

    def _write_model(self, engine: TrainEngine, folder: Path, compare_frozen: bool) -> dict[str, Part]:
        """Writes the trained parts and computes their hashes and their distances from the start weights."""
        shapes = {n: s for n, s in self.model_shapes.items() if part_of(n) in self.trains}
        starts = {part: open_part(self.run, part, self.start[part]) for part in PARTS}
        digests: dict[str, dict[str, str]] = {part: {} for part in PARTS}
        squares = dict.fromkeys(PARTS, 0.0)
        with TensorWriter(folder, "model", shapes) as writer:
            for name, array in engine.tensors("model"):
                part = part_of(name)
                if part not in self.trains:
                    if compare_frozen and tensor_digest(array) != starts[part].digest_as(name, array.dtype):
                        raise RuntimeError(f"part {part!r} is frozen in this stage, but its weights have changed: {name}")
                    continue
                writer.add(name, array)
                digests[part][name] = writer.digests[name]
                moved = array.astype(np.float64) - starts[part].read(name).astype(np.float64)
                squares[part] += float(np.vdot(moved, moved))
            writer.finish()
        self.frozen_compared = True
        hashes = self.start | {part: set_digest(digests[part]) for part in self.trains}
        return {
            part: Part(trained=part in self.trains, hash=hashes[part], start=self.start[part], distance=squares[part] ** 0.5)
            for part in PARTS
        }

    def _write_rest(self, engine: TrainEngine, folder: Path) -> None:
        trained = {n: s for n, s in self.model_shapes.items() if part_of(n) in self.trains}
        moments: tuple[Group, ...] = ("first_moment", "second_moment")
        shapes = {f"{group}.{name}": shape for group in moments for name, shape in trained.items()}
        write_set(folder, "optimizer", shapes, ((f"{g}.{n}", a) for g in moments for n, a in engine.tensors(g)))
        if self.config.stage_spec.distill:
            write_set(folder, "teacher", vision_shapes(self.vision, "teacher"), engine.tensors("teacher"))

    def _write_state(self, folder: Path, step: int, parts: dict[str, Part], counters: dict[str, int], ranks: int) -> None:
        state = {
            "format": FORMAT,
            "step": step,
            "data_position": step,
            "counters": counters,
            "parts": {name: part.model_dump() for name, part in parts.items()},
            "versions": versions(),
            "ranks": ranks,
            "fingerprints": self.fingerprints,
            "config": self.config.model_dump(mode="json"),
            "vision": self.vision.model_dump(mode="json"),
            "language": self.language.model_dump(mode="json"),
        }
        write_synced(folder / "state.json", json.dumps({"sha256": state_digest(state)} | state, indent=1))

    def _thin(self) -> None:
        for step in saved_steps(self.run)[: -self.config.train.keep_checkpoints]:
            old = step_directory(self.run, step)
            leaving = old.with_name(f".tmp-old-{old.name}")
            os.rename(old, leaving)  # readers never see a partly deleted checkpoint
            shutil.rmtree(leaving)
