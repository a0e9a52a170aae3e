"""Reads a run's checkpoints (`granvit.checkpoint.run_writer` writes them). Their files:

    RUN/checkpoints/step_0001000/model.safetensors        the parts that the stage trains, in float32 (the master weights)
                                 teacher.safetensors      the teacher, only if the stage distils
                                 optimizer.safetensors    first_moment.<parameter>, second_moment.<parameter>
                                 *.sha256.json            the checksum of every tensor
                                 state.json               step (also the position in the data), configuration, versions, counters,
                                                          number of ranks, fingerprints of stores and tokenizer; for each part its
                                                          hash and its distance from the start weights
    RUN/parts/<part>-<hash>/model.safetensors             the start weights of every part, in the dtype that they were read in,
                                                          written once. A frozen part is stored only here. Of a trained part,
                                                          distances are measured from these weights.

There is no separate file of master weights: trained parameters are held in float32 and cast in the forward pass. There is no
random state: the order of the data is a function of seed and step, and nothing else in a step is random.

Rank 0 writes a checkpoint under a temporary name, syncs it to the disk and renames it, so that readers see complete ones only.
"""
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from granvit.checkpoint.tensors import Members, TensorSet, set_digest, shape_differences
from granvit.config import RunConfig, validate
from granvit.engine import Group
from granvit.models import PARTS, LanguageConfig, Shapes, Strict, VisionConfig, parameter_shapes, part_of, vision_shapes

FORMAT = 2


class Part(Strict):
    """One part of the model in a checkpoint: `hash` is that of its weights, `start` that of its start weights, `distance` the L2
    distance between the two."""

    trained: bool
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    start: str = Field(pattern="^[0-9a-f]{64}$")
    distance: float = Field(ge=0)


class State(Strict):
    """state.json without its checksum. `ranks` is the number of ranks of the run, `fingerprints` are those of the tokenizer and
    the stores. Older checkpoints without these two have None and {}."""

    format: int
    step: NonNegativeInt
    data_position: NonNegativeInt
    counters: dict[str, int]
    parts: dict[Annotated[str, Field(pattern=f"^({'|'.join(PARTS)})$")], Part] = Field(min_length=len(PARTS))
    versions: dict[str, str]
    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    ranks: PositiveInt | None = None
    fingerprints: dict[str, str] = Field({})


class Checkpoint(State):
    """One complete checkpoint, opened for reading: its state, whose checksum is `digest`, and access to its tensors."""

    path: Path
    digest: str

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """A group's tensors, each checked against its checksum. `model` includes frozen parts and is in canonical order."""
        for name, (tensors, stored) in self._group(group).items():
            yield name, tensors.read(stored)

    def shapes(self, group: Group) -> Shapes:
        """Names and shapes of a group's tensors."""
        return {name: tensors.entries[stored]["shape"] for name, (tensors, stored) in self._group(group).items()}

    def check_architecture(self, vision: VisionConfig, language: LanguageConfig) -> None:
        """`ValueError` naming the first tensors that do not fit the architecture."""
        expected: dict[Group, Shapes] = {"model": parameter_shapes(vision, language)}
        trained = {n: s for n, s in expected["model"].items() if self.parts[part_of(n)].trained}
        expected |= {"first_moment": trained, "second_moment": trained}
        if self.config.stage_spec.distill:
            expected["teacher"] = vision_shapes(vision, "teacher")
        for group, shapes in expected.items():
            found = shape_differences(self.shapes(group), shapes)
            if found:
                raise ValueError(f"checkpoint {self.path} is of another architecture ({group}): " + "; ".join(found))

    def members(self) -> Members:
        """The model's tensors, first those of the trained parts, then those of each frozen part.

        `ValueError` if a tensor is there twice.
        """
        sets = [TensorSet(self.path, checked=True)] if any(part.trained for part in self.parts.values()) else []
        frozen = {name: part.hash for name, part in self.parts.items() if not part.trained}
        sets += [open_part(self.path.parents[1], name, digest) for name, digest in frozen.items()]
        found: Members = {}
        for tensors in sets:
            for name, entry in tensors.entries.items():
                if name in found:
                    raise ValueError(f"{entry['path']}: tensor {name!r} is also in {found[name][0].entries[name]['path']}")
                found[name] = tensors, name
        return found

    def _group(self, group: Group) -> Members:
        """Maps each parameter to the set that has it and its name in that set."""
        if group in ("first_moment", "second_moment"):
            moments = TensorSet(self.path, "optimizer", checked=True)
            prefix = f"{group}."
            return {n.removeprefix(prefix): (moments, n) for n in moments.shapes if n.startswith(prefix)}
        if group == "teacher":
            teacher = TensorSet(self.path, "teacher", checked=True)
            return {n: (teacher, n) for n in teacher.shapes}
        order = {n: i for i, n in enumerate(parameter_shapes(self.vision, self.language))}
        return dict(sorted(self.members().items(), key=lambda item: order.get(item[0], len(order))))


def open_part(run: Path, name: str, digest: str) -> TensorSet:
    """Opens a part in RUN/parts; `ValueError` if its checksums do not give the hash `digest`."""
    tensors = TensorSet(run / "parts" / f"{name}-{digest[:16]}", "model", checked=True)
    assert tensors.digests is not None  # because `checked`
    if set_digest(tensors.digests) != digest:
        raise ValueError(f"{tensors.directory}: its checksums do not give its hash {digest[:16]}...; it is damaged")
    return tensors


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending. Incomplete ones have other names and are not listed."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d{7,})", name)))


def newest_step(run: str | Path) -> int | None:
    """The step of a run's newest complete checkpoint; None if there is none."""
    return max(saved_steps(Path(run)), default=None)


def step_directory(run: str | Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return Path(run) / "checkpoints" / f"step_{step:07d}"


def newest_checkpoint(run: str | Path) -> Checkpoint | None:
    """The newest complete checkpoint in a run's directory; None if there is none. `ValueError` if it is damaged."""
    step = newest_step(run)
    return None if step is None else open_checkpoint(step_directory(run, step))


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the state of a checkpoint of this format or format 1. `ValueError` names state.json if it is damaged or of another
    format."""
    if path.parent.name != "checkpoints":
        path = path.resolve()  # `Checkpoint.path` must contain the run's directory, which `.` does not
    file = path / "state.json"
    try:
        tree = json.loads(file.read_text())
        stated = tree.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); the checkpoint is damaged") from None
    if state_digest(tree) != stated:
        raise ValueError(f"{file}: its contents do not match its checksum; the checkpoint is damaged")
    if tree.get("format") == 1:  # `train.global_batch` was rows x `data.regions_per_row`; since format 2 it is rows
        try:
            tree["config"]["train"]["global_batch"] //= tree["config"]["data"]["regions_per_row"]
        except (KeyError, TypeError, ArithmeticError) as error:
            key = "train.global_batch or data.regions_per_row"
            raise ValueError(f"{file}: config: {key} is missing or invalid ({error!r}); the checkpoint is damaged") from None
    elif tree.get("format") != FORMAT:
        raise ValueError(f"{file}: checkpoint format {tree.get('format')!r}; this version of granvit reads formats 1 to {FORMAT}")
    return validate(Checkpoint, tree | {"path": path, "digest": stated}, str(file))


def state_digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
