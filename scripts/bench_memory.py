"""The benchmark `memory` of scripts/bench.py: the memory of a training step of full size, without a device and without weights.

PyTorch's engine runs under `FakeTensorMode`: tensors have shapes and dtypes, but no values. A tracker adds up the live storages.
Attention uses the fused kernel for CPU, which like those of CUDA and CANN keeps no S x S array.
"""
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from granvit.config import RunConfig, load_config, resolve_models
from granvit.cost import activation_bytes, state_bytes
from granvit.data.batch import Batch
from granvit.engine import StepInputs
from granvit.models import LanguageConfig, VisionConfig
from granvit.plan import DEVICES
from pt_granvit import engine as pt_engine

USABLE_910B = DEVICES["910B3"].memory  # bytes
FUSED = "aten._scaled_dot_product_flash_attention_for_cpu"


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live storages that operators have created (`live`), and their maximum (`peak`)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.operators: set[str] = set()
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.add(str(func.overloadpacket))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._remove, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, size: int) -> None:
        self.live -= size

    def restart(self) -> int:
        """Returns the peak and starts a new one."""
        last, self.peak = self.peak, self.live
        return last


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step. `state` is allocated between steps; `activations` are kept by the forward pass for the backward pass.
    `passes` is the peak of forward and backward pass, `update` that of optimizer and teacher update; both include `state`."""

    parameters: int
    gradients: int
    moments: int
    teacher: int
    state: int
    activations: int
    passes: int
    update: int
    operators: frozenset[str]

    @property
    def peak(self) -> int:
        return max(self.passes, self.update)


@contextmanager
def _without_values() -> Iterator[None]:
    """Inside the block, values read on the host are ones, and start weights are not filled in."""
    ones = {"tolist": lambda self: np.ones(self.shape).tolist(), "item": lambda self: 1.0,
            "numpy": lambda self: np.ones(self.shape, np.float32)}  # fmt: skip
    with mock.patch.multiple(Tensor, **ones), mock.patch.object(pt_engine, "fill", lambda *arguments: None):
        yield


def measure(config: RunConfig, vision: VisionConfig, language: LanguageConfig, batch: Batch) -> StepMemory:
    """The memory of a training step of PyTorch's engine on one micro-batch; only the shapes of the batch matter."""
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker, _without_values():
        engine = pt_engine.Engine(config, vision, language, ())
        state = tracker.live
        tracker.restart()
        marks: dict[str, int] = {}
        losses, norm = engine.losses, engine.trained.gradient_norm

        def forward(*arguments):
            found = losses(*arguments)
            marks["activations"] = tracker.live - state
            return found

        def before_update():
            marks["passes"] = tracker.restart()
            return norm()

        with mock.patch.object(engine, "losses", forward), mock.patch.object(engine.trained, "gradient_norm", before_update):
            engine.step([batch], StepInputs(1, 1e-5, 0.9, max(batch.tokens, 1), max(batch.boxes, 1)))
        storages = lambda tensors: {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}  # noqa: E731
        held = lambda tensors: sum(storages(tensors).values())  # noqa: E731
        return StepMemory(
            parameters=held(engine.model.parameters()),
            gradients=held([engine.trained.gradients]),
            moments=held([engine.optimizer.first_moment, engine.optimizer.second_moment]),
            teacher=0 if engine.teacher is None else held(engine.teacher.parameters()),
            state=state,
            activations=marks["activations"],
            passes=marks["passes"],
            update=tracker.peak,
            operators=frozenset(tracker.operators),
        )


def largest_batch(config: RunConfig, vision: VisionConfig, rows: int) -> Batch:
    """A micro-batch of `rows` rows of zeros in the shape of the largest bucket."""
    bucket, K, crop = config.data.buckets[-1], config.boxes_per_row, config.crop_size(vision)
    S, A, R = bucket.length, bucket.answers, vision.image_size
    views = (vision.views,) if vision.tiles else ()
    ids = lambda *shape: np.zeros((rows, *shape), np.int32)  # noqa: E731
    return Batch(
        pixels_B3RR=np.zeros((rows, *views, 3, R, R), np.uint8), image_weights_B=np.ones(rows, np.float32),
        token_ids_BS=ids(S), positions_BS=ids(S), segments_BS=ids(S), image_positions_BN=ids(vision.image_tokens),
        answer_positions_BA=ids(A), answer_targets_BA=ids(A), answer_weights_BA=np.ones((rows, A), np.float32),
        boxes_BK4=np.zeros((rows, K, 4), np.float32), box_weights_BK=np.ones((rows, K), np.float32),
        crops_BK3rr=np.zeros((rows, K, 3, crop, crop), np.uint8), record_ids=("",) * rows, questions=rows,
        grids_B2=np.ones((rows, 2), np.int32) if vision.tiles else None,
    )  # fmt: skip


def with_recomputation(config: RunConfig, recompute: bool) -> RunConfig:
    kernels = {**config.runtime.kernels, "attention": "sdpa"}
    runtime = config.runtime.model_copy(update={"recompute": recompute, "device": "cpu", "kernels": kernels})
    return config.model_copy(update={"runtime": runtime})


def memory(console: Console, path: str | Path, micro_batches: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Prints the table of one configuration: measured for PyTorch, by formula for both frameworks."""
    config = load_config(path)
    vision, language = resolve_models(config)
    stage, bucket = config.stage_spec, config.data.buckets[-1]
    table = Table(title=f"{path}: {config.runtime.compute}, rows of {bucket.length} tokens and {bucket.answers} answers; GB")
    columns = ("rows", "recompute", "activations", "by formula", "passes, peak", "by formula", "update, peak",
               "MindSpore, by formula", f"share of {USABLE_910B / 1e9:.1f}")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    gb = lambda size: f"{size / 1e9:.1f}"  # noqa: E731
    for recompute in (False, True):
        for rows in micro_batches:
            train = config.train.model_copy(update={"micro_batch": rows})  # decides whether logits are cut into chunks
            sized = with_recomputation(config.model_copy(update={"train": train}), recompute)
            found = measure(sized, vision, language, largest_batch(config, vision, rows))
            assert FUSED in found.operators, "attention is not fused"
            shape = (vision, language, stage.trains, rows, bucket.length, bucket.answers, recompute)
            state = state_bytes(vision, language, stage.trains, stage.distill, 2)
            ours, other = activation_bytes(*shape), state + sum(activation_bytes(*shape, "mindspore"))
            most = max(found.peak, other)
            table.add_row(str(rows), "yes" if recompute else "no", gb(found.activations), gb(ours[0]), gb(found.passes),
                          gb(state + sum(ours)), gb(found.update), gb(other), f"{most / USABLE_910B:.0%}")  # fmt: skip
    parts = {name: getattr(found, name) for name in ("parameters", "gradients", "moments", "teacher", "state")}
    console.print(table)
    console.print(", ".join(f"{name} {gb(size)}" for name, size in parts.items()) + " GB")
