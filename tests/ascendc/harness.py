"""Builds the programs of this folder with g++ and runs the operators of `ms_granvit/ops/ascendc` in them.

`harness.cpp` says what is run, `include/kernel_operator.h` which rules are checked and what is counted.
"""
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers")
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TYPES = {"float32": ("float", np.float32), "float16": ("half", np.float16), "bfloat16": ("bfloat16_t", ml_dtypes.bfloat16)}
CORES, UB = 40, 192 * 1024  # of an Ascend 910B3: vector cores, bytes of UB of each (CANN's platform_config/Ascend910B3.ini)


class Sizes(NamedTuple):
    """Features `[B, H, W, C]`, K boxes an image, g x g bins a box."""

    B: int
    H: int
    W: int
    C: int
    K: int
    g: int


def compiler() -> str | None:
    return shutil.which("g++")


def build(source: str, program: Path, *flags: str) -> Path:
    """Compiles `source` of this folder; `RuntimeError` with the compiler's messages."""
    command = ["g++", *FLAGS, *flags, "-I", str(HERE / "include"), str(HERE / source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return program


class Harness:
    """The operators for features of one dtype ("float32", "float16" or "bfloat16"), built in `folder`."""

    def __init__(self, folder: Path, dtype: str, *flags: str) -> None:
        name, self.dtype = TYPES[dtype]
        self.folder = folder / f"{dtype}{len(flags)}"
        self.folder.mkdir(parents=True)
        types = (f"-DDTYPE_FEATURES={name}", f"-DDTYPE_OUT_GRAD={name}")
        self.program = build("harness.cpp", self.folder / "harness", *types, *flags)

    def run(
        self, kind: str, array: np.ndarray | None, boxes_BK4: np.ndarray, sizes: Sizes, cores: int = CORES, ub: int = UB
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """`kind` "forward" takes features `[B, H, W, C]`, "backward" the output's gradient `[B, K, g, g, C]`. Returns the result
        in float64 and the counts. Without an array it only counts. `RuntimeError` names the rule that a kernel broke."""
        boxes_BK4.astype(np.float32).tofile(self.folder / "boxes.bin")
        if array is not None:
            array.astype(self.dtype).tofile(self.folder / "array.bin")
        words = [self.program, kind, self.folder, *sizes, cores, ub, *(["count"] if array is None else [])]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        B, H, W, C, K, g = sizes
        shape = (B, K, g, g, C) if kind == "forward" else (B, H, W, C)
        out = np.zeros(0) if array is None else np.fromfile(self.folder / "out.bin", self.dtype).astype(np.float64).reshape(shape)
        return out, json.loads(done.stdout)
