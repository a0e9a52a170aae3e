"""Conditions for a comparison. If one fails, the result is "could not tell", not "diverged"."""
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from parity.fixture import digest

NAMES = {
    "weights": "the start weights (hash over names, shapes and bytes)",
    "batches": "the batches (hash over arrays)",
    "options": "the option configurations (hash over models, weights and batches)",
    "vision": "the encoder's configuration",
    "language": "the decoder's configuration",
    "seed": "the fixture's seed",
    "steps": "the number of steps of the trajectory",
}


class CouldNotTell(Exception):
    """The records cannot be compared; the message says how they differ and what to do."""


def check_comparable(records: Sequence[Any]) -> None:
    """`CouldNotTell` if the settings of the records (`parity.capture.Record`) are not equal."""
    first = records[0]
    for other in records[1:]:
        for key, what in NAMES.items():
            if first.settings.get(key) != other.settings.get(key):
                raise CouldNotTell(
                    f"{first.framework} and {other.framework} differ in {what}: {_short(first.settings.get(key))} and "
                    f"{_short(other.settings.get(key))}. Record both with the same options of the same version"
                )


def check_deterministic(framework: str, one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    """`CouldNotTell` if two runs of the same computation differ in any bit: something in it is random."""
    if digest(one.items()) != digest(two.items()):
        unlike = [n for n in one if not np.array_equal(one[n], two[n], equal_nan=True)]
        raise CouldNotTell(f"{framework} got different bits for one batch twice, first in {unlike[0]}; switch off randomness")


def check_precision(framework: str) -> None:
    """`CouldNotTell` if the environment reduces the precision of float32 products."""
    if framework == "torch":
        import torch

        if torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32:
            raise CouldNotTell("PyTorch computes float32 products in TF32; call torch.set_float32_matmul_precision('highest')")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise CouldNotTell("NVIDIA_TF32_OVERRIDE=1 makes float32 products TF32; unset it")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
