"""A run's checkpoints: safetensors and a state, streamed, atomic, checked.

    RUN/checkpoints/step_0001000/model.safetensors        the parts that the stage trains: float32, they ARE the masters
                                 teacher.safetensors      where the stage distils
                                 optimizer.safetensors    first_moment.<parameter>, second_moment.<parameter>
                                 *.sha256.json            the checksum of every tensor
                                 state.json               step (also the position in the data), configuration, versions, counters,
                                                          number of ranks, fingerprints of stores and tokenizer, hash and
                                                          distance from the start weights per part
    RUN/parts/<part>-<hash>/model.safetensors             every part as it was at the start, in the precision it came in, written
                                                          once: a frozen part is never written again and goes on to the next
                                                          stage as it came, a trained one is what distances are measured from

There is no separate masters file: trained parameters are held in float32 and cast in the forward pass. There is no random
state: the order of the data is a function of seed and step, and nothing else in a step is random.

A checkpoint is written beside, synced and renamed: a reader sees all of it or nothing. Rank 0 writes alone.
"""
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from granvit.checkpoint.tensors import (
    TensorSet,
    TensorWriter,
    set_digest,
    shape_differences,
    sync_directory,
    tensor_digest,
    write_set,
    write_synced,
)
from granvit.config import RunConfig, differences, validate
from granvit.engine import Group, TrainEngine
from granvit.models import PARTS, LanguageConfig, Shapes, Strict, VisionConfig, parameter_shapes, part_of, vision_shapes

FORMAT = 1
# What a resumed run may change. How a global batch is divided (micro-batches, ranks), whether activations are computed again, and
# on which device: these change the order of floating-point sums at most.
MAY_CHANGE = (
    "output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.skip_non_finite",
    "train.micro_batch", "data.workers", "eval.", "runtime.device", "runtime.jit_level", "runtime.attention",
    "runtime.recompute", "ranks",
)  # fmt: skip
PER_DEVICE = ("train.micro_batch", "ranks")  # enter the result where train.loss_reduction averages means of each device
WHERE_STATED = ("runtime.compute",)  # changes every rounding: only where the command line says so


class CheckpointNotSaved(OSError):
    """The disk refused a checkpoint; the previous one is whole."""


@dataclass(frozen=True)
class Part:
    """One part of the model in a checkpoint: `hash` of its weights now, `start` of its start weights, `distance` (L2)
    between the two."""

    trained: bool
    hash: str
    start: str
    distance: float


class PartState(Strict):
    """A `Part` in state.json."""

    trained: bool
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    start: str = Field(pattern="^[0-9a-f]{64}$")
    distance: float = Field(ge=0)


class State(Strict):
    """state.json without its checksum."""

    format: int
    step: NonNegativeInt
    data_position: NonNegativeInt
    counters: dict[str, int]
    parts: dict[Literal["vision", "projector", "language"], PartState] = Field(min_length=len(PARTS))
    versions: dict[str, str]
    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    ranks: PositiveInt | None = None
    fingerprints: dict[str, str] = Field({})


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint, opened for reading. `digest` is that of its state. `ranks` (how many wrote it) and `fingerprints` (of
    tokenizer and stores) are None and empty in a checkpoint from before they were kept."""

    path: Path
    digest: str
    step: int
    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    parts: dict[str, Part]
    counters: dict[str, int]
    versions: dict[str, str]
    ranks: int | None
    fingerprints: dict[str, str]

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """A group's tensors, each checked against its checksum (`model`: frozen parts included, in canonical order)."""
        for name, (tensors, stored) in self._group(group).items():
            yield name, tensors.read(stored)

    def shapes(self, group: Group) -> Shapes:
        """A group's names and shapes."""
        return {name: tensors.shapes[stored] for name, (tensors, stored) in self._group(group).items()}

    def check_architecture(self, vision: VisionConfig, language: LanguageConfig) -> None:
        """`ValueError` naming the first keys in which the checkpoint is of another architecture."""
        expected: dict[Group, Shapes] = {"model": parameter_shapes(vision, language)}
        trained = {n: s for n, s in expected["model"].items() if self.parts[part_of(n)].trained}
        expected |= {"first_moment": trained, "second_moment": trained}
        if self.config.stage_spec.distill:
            expected["teacher"] = vision_shapes(vision, "teacher")
        for group, shapes in expected.items():
            found = shape_differences(self.shapes(group), shapes)
            if found:
                raise ValueError(f"checkpoint {self.path} is of another architecture ({group}): " + "; ".join(found))

    def _group(self, group: Group) -> dict[str, tuple[TensorSet, str]]:
        """parameter name -> (the set that holds it, its name there)."""
        if group in ("first_moment", "second_moment"):
            moments = TensorSet(self.path, "optimizer", checked=True)
            prefix = f"{group}."
            return {n.removeprefix(prefix): (moments, n) for n in moments.shapes if n.startswith(prefix)}
        if group == "teacher":
            teacher = TensorSet(self.path, "teacher", checked=True)
            return {n: (teacher, n) for n in teacher.shapes}
        found = {}
        if any(part.trained for part in self.parts.values()):
            trained = TensorSet(self.path, "model", checked=True)
            found = {n: (trained, n) for n in trained.shapes}
        for name, part in self.parts.items():
            if not part.trained:
                frozen = open_part(self.path.parents[1], name, part.hash)
                found |= {n: (frozen, n) for n in frozen.shapes}
        order = {n: i for i, n in enumerate(parameter_shapes(self.vision, self.language))}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def open_part(run: Path, name: str, digest: str) -> TensorSet:
    """A part in RUN/parts, its checksums compared with the hash it is referred to by."""
    tensors = TensorSet(run / "parts" / f"{name}-{digest[:16]}", "model", checked=True)
    assert tensors.digests is not None
    if set_digest(tensors.digests) != digest:
        raise ValueError(f"{tensors.directory}: its checksums do not add up to the hash it is referred to by; it is damaged")
    return tensors


def _steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints, rising. What is half written has another name and is not among them."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d{7,})", name)))


def newest_step(run: str | Path) -> int | None:
    """The step of a run's newest whole checkpoint; None where there is none."""
    return max(_steps(Path(run)), default=None)


def step_directory(run: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / "checkpoints" / f"step_{step:07d}"


def newest_checkpoint(run: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run's directory; None where there is none. `ValueError` where it is damaged."""
    step = newest_step(run)
    return None if step is None else open_checkpoint(step_directory(run, step))


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's state; `ValueError` where it is damaged or of a later format."""
    if path.parent.name != "checkpoints":
        path = path.resolve()  # its run's directory is two above, also where the path is `.`
    file = path / "state.json"
    try:
        tree = json.loads(file.read_text())
        stated = tree.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); the checkpoint is damaged") from None
    if _state_digest(tree) != stated:
        raise ValueError(f"{file}: its contents are not those that were written (checksum)")
    if tree.get("format") != FORMAT:
        raise ValueError(f"{file}: checkpoint format {tree.get('format')!r}; this version of granvit reads format {FORMAT}")
    state = validate(State, tree, str(file))
    return Checkpoint(
        path=path,
        digest=stated,
        step=state.step,
        config=state.config,
        vision=state.vision,
        language=state.language,
        parts={name: Part(**vars(part)) for name, part in state.parts.items()},
        counters=state.counters,
        versions=state.versions,
        ranks=state.ranks,
        fingerprints=state.fingerprints,
    )


def _state_digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_same_run(checkpoint: Checkpoint, config: RunConfig, vision: VisionConfig, language: LanguageConfig, ranks: int,
                   stated: Collection[str] = ()) -> list[str]:  # fmt: skip
    """`ValueError` naming every difference where `config` on so many ranks may not continue the run that `checkpoint` belongs to.

    Returns the differences that may be, as `key: old -> new`. `stated` are the keys given on the command line.
    """
    changed = differences(checkpoint.config, config)
    if checkpoint.ranks not in (None, ranks):
        changed.append(f"ranks: {checkpoint.ranks} -> {ranks}")
    unstated = [line for line in changed if line.startswith(WHERE_STATED) and line.partition(":")[0] not in stated]
    fixed = PER_DEVICE if config.train.loss_reduction == "per_device" else ()
    wrong = [line for line in changed if line.startswith(fixed) or not line.startswith(MAY_CHANGE + WHERE_STATED)]
    run = checkpoint.path.parents[1]
    if wrong:
        raise ValueError(
            f"{run} holds a run of another configuration: {'; '.join(wrong + unstated)}. "
            f"Use the same configuration to resume it ({run / 'config.yaml'} has it), --fresh to start over, or another output="
        )
    if unstated:
        raise ValueError(
            f"{run} holds a run of another precision: {'; '.join(unstated)}. Every later step would round otherwise: "
            f"state runtime.compute={config.runtime.compute} on the command line if that is meant, or use the same configuration"
        )
    checkpoint.check_architecture(vision, language)
    return changed


def check_same_data(checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    """`ValueError` naming each store, or the tokenizer, that is not the one the run was trained on until `checkpoint`."""
    changed = [
        f"{what} has fingerprint {fingerprints[what]}, the run was trained on {before}"
        for what, before in checkpoint.fingerprints.items()
        if fingerprints[what] != before
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.path} was made from other data: {'; '.join(changed)}. Put back what was there, "
            f"use --fresh to start over, or another output="
        )


def versions() -> dict[str, str]:
    """The installed versions of what can enter a result."""
    names = ("granvit", "numpy", "grain", "tokenizers", "pillow", "safetensors", "ml_dtypes", "mindspore", "torch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, unless it was renamed."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointNotSaved(error.errno, f"{what}: {error.strerror}; earlier checkpoints are whole") from error


@dataclass
class CheckpointWriter:
    """Writes one run's checkpoints (rank 0). `start` maps each part to the hash of its start weights in RUN/parts, `fingerprints`
    names what the run reads (`granvit.preflight.fingerprints`)."""

    run: Path
    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    start: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trains = self.config.stage_spec.trains
        self.model_shapes = parameter_shapes(self.vision, self.language)
        for folder in ("checkpoints", "parts"):
            (self.run / folder).mkdir(parents=True, exist_ok=True)
            for leftover in (self.run / folder).glob(".tmp-*"):
                shutil.rmtree(leftover)

    def record_start(self, start: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Passes the start weights on, and writes them as they pass, in the precision they come in.

        The files are there once the last tensor has been taken.
        """
        what = f"the start weights of {self.run} could not be written"
        with ExitStack() as stack:
            folders, writers = {}, {}
            for part in PARTS:
                with _disk_errors(what):
                    folders[part] = stack.enter_context(_temporary(self.run / "parts" / f".tmp-{part}-{os.getpid()}"))
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
                    if not into.exists():  # it does where an earlier start of the same run wrote the same bytes
                        sync_directory(folders[part])
                        os.rename(folders[part], into)
                sync_directory(self.run / "parts")

    def save(self, engine: TrainEngine, step: int, counters: dict[str, int]) -> Checkpoint:
        """Writes the state after `step` and then drops the oldest checkpoints beyond `train.keep_checkpoints`.

        `CheckpointNotSaved` where the disk refuses; what was written so far is removed and earlier checkpoints stay whole.
        """
        into = step_directory(self.run, step)
        if into.exists():
            return open_checkpoint(into)  # the same step of the same run: the same bytes
        temporary = into.with_name(f".tmp-{into.name}-{os.getpid()}")
        with _disk_errors(f"checkpoint {into} could not be written"), _temporary(temporary) as folder:
            parts = self._write_model(engine, folder)
            self._write_rest(engine, folder)
            self._write_state(folder, step, parts, counters, engine.world)
            sync_directory(folder)
            os.rename(folder, into)
            sync_directory(into.parent)
        self._thin()
        return open_checkpoint(into)

    def _write_model(self, engine: TrainEngine, folder: Path) -> dict[str, Part]:
        """Writes the trained parts, hashed and measured from their start; compares the frozen ones with theirs."""
        shapes = {n: s for n, s in self.model_shapes.items() if part_of(n) in self.trains}
        starts = {part: open_part(self.run, part, self.start[part]) for part in PARTS}
        digests: dict[str, dict[str, str]] = {part: {} for part in PARTS}
        squares = dict.fromkeys(PARTS, 0.0)
        with TensorWriter(folder, "model", shapes) as writer:
            for name, array in engine.tensors("model"):
                part = part_of(name)
                if part not in self.trains:
                    if tensor_digest(array) != starts[part].digest_as(name, array.dtype):
                        raise RuntimeError(f"part {part!r} is frozen in this stage, but its weights have changed: {name}")
                    continue
                writer.add(name, array)
                digests[part][name] = writer.digests[name]
                moved = array.astype(np.float64) - starts[part].read(name).astype(np.float64)
                squares[part] += float(np.vdot(moved, moved))
            writer.finish()
        hashes = self.start | {part: set_digest(digests[part]) for part in self.trains}
        return {part: Part(part in self.trains, hashes[part], self.start[part], squares[part] ** 0.5) for part in PARTS}

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
            "parts": {name: vars(part) for name, part in parts.items()},
            "versions": versions(),
            "ranks": ranks,
            "fingerprints": self.fingerprints,
            "config": self.config.model_dump(mode="json"),
            "vision": self.vision.model_dump(mode="json"),
            "language": self.language.model_dump(mode="json"),
        }
        write_synced(folder / "state.json", json.dumps({"sha256": _state_digest(state)} | state, indent=1))

    def _thin(self) -> None:
        for step in _steps(self.run)[: -self.config.train.keep_checkpoints]:
            old = step_directory(self.run, step)
            going = old.with_name(f".tmp-old-{old.name}")
            os.rename(old, going)  # a reader sees all of it or nothing
            shutil.rmtree(going)
