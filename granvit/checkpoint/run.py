"""A run's checkpoints, read: safetensors and a state, streamed, atomic, checked (`granvit.checkpoint.run_writer` writes them).

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
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from granvit.checkpoint.tensors import TensorSet, set_digest, shape_differences
from granvit.config import RunConfig, validate
from granvit.engine import Group
from granvit.models import PARTS, LanguageConfig, Shapes, Strict, VisionConfig, parameter_shapes, part_of, vision_shapes

FORMAT = 2


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
    assert tensors.digests is not None  # they are checked
    if set_digest(tensors.digests) != digest:
        raise ValueError(f"{tensors.directory}: its checksums do not add up to the hash it is referred to by; it is damaged")
    return tensors


def saved_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints, rising. What is half written has another name and is not among them."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d{7,})", name)))


def newest_step(run: str | Path) -> int | None:
    """The step of a run's newest whole checkpoint; None where there is none."""
    return max(saved_steps(Path(run)), default=None)


def step_directory(run: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / "checkpoints" / f"step_{step:07d}"


def newest_checkpoint(run: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run's directory; None where there is none. `ValueError` where it is damaged."""
    step = newest_step(run)
    return None if step is None else open_checkpoint(step_directory(run, step))


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's state, of this format or of format 1; `ValueError` where it is damaged or of a later format."""
    if path.parent.name != "checkpoints":
        path = path.resolve()  # its run's directory is two above, also where the path is `.`
    file = path / "state.json"
    try:
        tree = json.loads(file.read_text())
        stated = tree.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); the checkpoint is damaged") from None
    if state_digest(tree) != stated:
        raise ValueError(f"{file}: its contents are not those that were written (checksum)")
    if tree.get("format") == 1:
        _count_rows(tree)
    elif tree.get("format") != FORMAT:
        raise ValueError(f"{file}: checkpoint format {tree.get('format')!r}; this version of granvit reads formats 1 to {FORMAT}")
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


def _count_rows(state: dict) -> None:
    """In format 1 `train.global_batch` counted questions, `data.regions_per_row` for every row; it counts rows since."""
    config = state["config"]
    config["train"]["global_batch"] //= config["data"]["regions_per_row"]


def state_digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
