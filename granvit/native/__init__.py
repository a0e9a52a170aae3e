"""CPU kernels in C++, forward and backward, float32: ROIAlign and attention for both frameworks, small operators for MindSpore.

The library is compiled when GranViT is installed, if the machine has a C++ compiler, or later by `python -m granvit.native`. One
library holds the loops for plain processors, AVX2 and AVX-512 and takes what the processor has. Without it everything runs on
the composed operators, and `why_missing` says what to do.

The library is loaded once in a process, and only if it is whole and was compiled from the sources beside it. It works on as many
threads as the process has processors, or `OMP_NUM_THREADS` if that is less; the number of threads does not change a result.

Layout letters: B rows, H query heads (or rows of features), G key-value heads, S queries, L keys, D head width; W columns of
features, C their width, K boxes, g output cells along a side.
"""
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAME = "kernels.so"
SOURCES = ("inner.h", "inner.cpp", "kernels.cpp", "machine.h", "small.h", "small.cpp", "small_kernels.cpp")
# No -ffast-math: it would let the compiler assume that there is no NaN. The two flags below concern errno and floating-point
# traps only.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
X86_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
}
# Loops that are compiled once for each instruction set: the source, the macro that names its table, and its flags.
LOOPS = {"loops": ("inner.cpp", "LOOPS", ()), "small": ("small.cpp", "SMALL_LOOPS", ("-ffp-contract=off",))}
X86 = ("x86_64", "AMD64")
REMEDY = "install a C++ compiler (g++ or clang++), then run: python -m granvit.native"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the text says why in one line."""


def seal(body: bytes) -> bytes:
    """What stands behind a library of these bytes: a digest of it, and of the sources and flags that it was compiled from.

    The loader does not look there. It is read before the library is loaded, because loading half a file ends the process.
    """
    sources = hashlib.sha256(repr((FLAGS, X86_FLAGS, LOOPS)).encode())
    for name in SOURCES:
        sources.update((HERE / name).read_bytes())
    return f"granvit {hashlib.sha256(body).hexdigest()} {sources.hexdigest()}".encode()


def compiler() -> list[str] | None:
    """The command of the C++ compiler: `CXX`, or the first of g++, c++, clang++ that is installed."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        return asked if shutil.which(asked[0]) else None
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def build(directory: str | Path, flags: Sequence[str] = ()) -> Path:
    """Compiles the kernels into `directory` (in seconds) and returns the library's path; `flags` are added to every command.

    Each instruction set is compiled from the same source by a command of its own. The library replaces an older one at once.
    Raises BuildError if there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'g++, c++ and clang++'} not found")
    instruction_sets = {"base": ()} | (X86_FLAGS if platform.machine() in X86 else {})
    parts = [("kernels.cpp",), ("small_kernels.cpp",)]
    for table, (source, macro, own) in LOOPS.items():
        parts += [(source, f"-D{macro}={table}_{name}", *own, *for_set) for name, for_set in instruction_sets.items()]
    try:
        with tempfile.TemporaryDirectory(dir=Path(directory).resolve()) as folder, ThreadPoolExecutor() as threads:

            def compile_part(number: int) -> str:
                made = f"{folder}/{number}.o"
                run([*command, *FLAGS, *parts[number], *flags, "-c", "-o", made])
                return made

            objects = list(threads.map(compile_part, range(len(parts))))
            made = Path(folder) / NAME
            run([*command, "-shared", "-pthread", *flags, *objects, "-o", str(made)])
            with made.open("ab") as file:
                file.write(seal(made.read_bytes()))
            return made.replace(Path(directory).resolve() / NAME)
    except OSError as error:
        raise BuildError(str(error)) from error


def run(command: list[str]) -> None:
    """Runs a compiler in the folder of the sources; raises BuildError with its first line of error."""
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(f"{command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")


@functools.cache
def opened(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library at `path` and "", or None and the reason why it cannot be used."""
    if not path.exists():
        return None, "they are not built"
    try:
        content = path.read_bytes()
        size = len(content) - len(seal(b""))
        body, found = content[: max(size, 0)], content[max(size, 0) :]
        expected = seal(body)
        if found.split()[:2] != expected.split()[:2]:
            return None, f"{path} is damaged"
        if found != expected:
            return None, f"{path} was built from other sources"
        loaded = ctypes.CDLL(str(path))
        loaded.granvit_instruction_set.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load ({str(error).splitlines()[0]})"
    return loaded, ""


def library() -> Path | None:
    """The path of the library if it can be used in this process, else None."""
    return HERE / NAME if opened(HERE / NAME)[0] else None


def why_missing() -> str | None:
    """One line on what would be faster with the library and how to get it; None if the library is there."""
    loaded, reason = opened(HERE / NAME)
    if loaded:
        return None
    return f"ROIAlign, attention and other operators on CPU would be faster with the C++ kernels; {reason}: {REMEDY}"


def instruction_set() -> str:
    """The loops that run on this processor: base, avx2 or avx512."""
    return functions().granvit_instruction_set().decode()


def identity() -> str:
    """The library's path and what `seal` says of it, or "": graphs that hold one library's operators cannot run with another."""
    path = library()
    return f"{path} {path.read_bytes()[-len(seal(b'')) :].decode()}" if path else ""


def cannot_attend(head_dim: int, masked: bool, cached: bool) -> str:
    """Why attention with these sizes does not run: generation with caches has a mask that segments do not say."""
    return "generation with caches has no segments" if cached else ""


def unwise(**sizes: Any) -> str:
    """Why the kernels are not the default on this machine. Without AVX2 they were slower than the frameworks' operators on
    x86-64; on other machines they were not timed."""
    if platform.machine() not in X86:
        return f"not timed on {platform.machine()}"
    return "the processor has no AVX2" if library() and instruction_set() == "base" else ""


def functions() -> ctypes.CDLL:
    """The loaded library. Raises ValueError if there is none."""
    loaded = opened(HERE / NAME)[0]
    if loaded is None:
        raise ValueError(why_missing())
    return loaded


def call(name: str, pointers: Sequence[int | None], sizes: Sequence[int]) -> None:
    """Calls a function of the library: addresses of contiguous arrays (None: no array), then sizes. Python's lock is released
    meanwhile. Raises MemoryError."""
    status = getattr(functions(), name)(*map(ctypes.c_void_p, pointers), *map(ctypes.c_int64, sizes))
    if status == 1:
        raise MemoryError(f"{name}: not enough memory")
    assert status == 0, f"{name}: status {status}"


def check_dtypes(expected: str, **dtypes: object) -> None:
    """Raises ValueError for the first argument whose dtype (of numpy, torch or MindSpore) is not `expected`."""
    for name, dtype in dtypes.items():
        found = re.findall(r"\w+", str(dtype))[-1].lower()  # torch.float32, Float32, Tensor[Float32]
        if found != expected:
            raise ValueError(f"{name} is {found}; the native kernels take {expected}: convert it or use composed")


def check_roi_align(features_BHWC: Sequence[int], boxes_BK4: Sequence[int], grid: int) -> tuple[int, int, int, int, int]:
    """The output's shape `[B, K, grid, grid, C]` for these shapes; ValueError names the argument that does not fit."""
    if len(features_BHWC) != 4 or min(features_BHWC[1:3]) < 1:
        raise ValueError(f"features_BHWC has shape {list(features_BHWC)}; it must be [B, H, W, C] with at least one cell")
    B, _, _, C = features_BHWC
    if len(boxes_BK4) != 3 or boxes_BK4[0] != B or boxes_BK4[2] != 4:
        raise ValueError(f"boxes_BK4 has shape {list(boxes_BK4)}; it must be [{B}, K, 4]")
    if grid < 1:
        raise ValueError(f"grid is {grid}; it must be at least 1")
    return B, boxes_BK4[1], grid, grid, C


def check_attention(
    q_BHSD: Sequence[int], k_BGLD: Sequence[int], v_BGLD: Sequence[int], segments_BS: Sequence[int] | None
) -> tuple[int, int, int, int, int, int]:
    """The sizes B, H, G, S, L, D of these shapes; ValueError names the argument that does not fit."""
    if len(q_BHSD) != 4 or q_BHSD[1] < 1 or q_BHSD[3] < 1:
        raise ValueError(f"q_BHSD has shape {list(q_BHSD)}; it must be [B, H, S, D] with H and D at least 1")
    B, H, S, D = q_BHSD
    if len(k_BGLD) != 4 or k_BGLD[0] != B or k_BGLD[3] != D or k_BGLD[1] < 1 or H % k_BGLD[1] or k_BGLD[2] < 1:
        raise ValueError(f"k_BGLD has shape {list(k_BGLD)}; it must be [{B}, G, L, {D}] with G a divisor of {H} and L at least 1")
    if tuple(v_BGLD) != tuple(k_BGLD):
        raise ValueError(f"v_BGLD has shape {list(v_BGLD)}; it must be that of k_BGLD, {list(k_BGLD)}")
    _, G, L, _ = k_BGLD
    if segments_BS is not None and (tuple(segments_BS) != (B, S) or S != L):
        raise ValueError(f"segments_BS has shape {list(segments_BS)}; it must be [{B}, {S}], with as many keys ({L}) as queries")
    return B, H, G, S, L, D


def check_norm(x: Sequence[int], weight: Sequence[int], *bias: Sequence[int]) -> None:
    """ValueError names the argument of a norm over the last axis whose shape does not fit."""
    if len(x) < 2 or x[-1] < 1:
        raise ValueError(f"x has shape {list(x)}; it must have at least two axes, and a last axis of at least 1")
    for name, shape in zip(("weight", "bias"), (weight, *bias), strict=False):
        if tuple(shape) != (x[-1],):
            raise ValueError(f"{name} has shape {list(shape)}; it must be [{x[-1]}], the last axis of x")


def check_rope(x_BHSD: Sequence[int], cos_B1SD: Sequence[int], sin_B1SD: Sequence[int]) -> None:
    """ValueError names the argument of the rotary embedding whose shape does not fit."""
    if len(x_BHSD) != 4 or x_BHSD[3] % 2:
        raise ValueError(f"x_BHSD has shape {list(x_BHSD)}; it must be [B, H, S, D] with D even")
    B, _, S, D = x_BHSD
    for name, shape in (("cos_B1SD", cos_B1SD), ("sin_B1SD", sin_B1SD)):
        if tuple(shape) != (B, 1, S, D):
            raise ValueError(f"{name} has shape {list(shape)}; it must be [{B}, 1, {S}, {D}]")


def check_same_shape(gate: Sequence[int], up: Sequence[int]) -> None:
    """ValueError if `up` has not the shape of `gate`."""
    if tuple(gate) != tuple(up):
        raise ValueError(f"up has shape {list(up)}; it must be that of gate, {list(gate)}")


def main() -> int:
    """Builds in place and says what was done: `python -m granvit.native`."""
    try:
        path = build(HERE)
    except BuildError as error:
        print(f"not built: {error}. GranViT runs without it. To have it, {REMEDY}")
        return 1
    opened.cache_clear()
    print(why_missing() or f"built {path} with {shlex.join(compiler() or [])}; this processor runs its {instruction_set()} loops")
    return int(library() is None)
