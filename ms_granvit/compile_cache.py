"""Compiled graphs on disk: a run that starts again loads its graphs instead of compiling them.

MindSpore's own compile cache (experimental in 2.9) knows a graph only by how many graphs the process has compiled before it. A
process that compiles other graphs, or the same ones in another order, is given a wrong graph. Here a file is named by everything
that its graph depends on, and is handed to MindSpore under the number that MindSpore asks for.

Only graphs without a collective are cached, so one file serves every rank, and any number of ranks.
"""
import atexit
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, nn

from granvit.logs import log

ROOT = Path(__file__).resolve().parents[1]
COMPILER_SETTINGS = ("MS_DEV_", "MS_ENABLE_", "MS_INTERNAL_", "MS_JIT", "MS_KERNEL")  # prefixes of environment variables
SWITCH = "MS_COMPILER_CACHE_ENABLE"
DIGEST = 32  # bytes of SHA-256 in front of a stored graph


class CompileCache:
    """The graphs of one engine, stored in `folder`.

    `depends_on` (JSON types) holds everything in the run's configuration that a graph depends on. A file's name also has a hash
    of the source code, the versions of Python and MindSpore, the environment variables that MindSpore's compiler reads, and
    the dtypes and shapes of the graph's inputs. `counts` says how many graphs were loaded and how many compiled.
    """

    def __init__(self, folder: str, rank: int, depends_on: dict):
        self.folder, self.rank, self.depends_on = Path(folder).expanduser(), rank, depends_on
        self.counts = {"loaded": 0, "compiled": 0}

    def attach(self, name: str, cell: nn.Cell) -> None:
        """From now on, `cell` loads its graphs from the cache where they are there, and stores those that it compiles."""
        compile_unless_known, signatures = cell.compile, set()

        def compile_with_cache(*inputs, **kwargs) -> None:
            signature = tuple(f"{v.dtype}{v.shape}" if isinstance(v, Tensor) else repr(v) for v in inputs)
            if signature in signatures:
                compile_unless_known(*inputs, **kwargs)
            else:
                signatures.add(signature)
                self._load_or_compile(name, self.path(name, signature), lambda: compile_unless_known(*inputs, **kwargs))

        cell.compile = compile_with_cache

    def path(self, name: str, signature: tuple[str, ...]) -> Path:
        """Where the graph of the cell called `name` for inputs of this signature is stored."""
        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(COMPILER_SETTINGS)}
        key = [signature, self.depends_on, settings, source_digest(), ms.__version__, platform.python_version()]
        return self.folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.graph"

    def _load_or_compile(self, name: str, path: Path, compile_now: Callable[[], None]) -> None:
        began, mindspore = time.monotonic(), exchange(self.rank)
        stored = _read(path) if mindspore.loads else None
        compiled = mindspore.compile(stored, compile_now)
        outcome = "loaded" if compiled is None else "compiled"
        self.counts[outcome] += 1
        log.info("graph %s %s in %.0f s (%s)", name, outcome, time.monotonic() - began, path)
        if compiled is not None and not path.exists():
            _write(path, compiled)


class Exchange:
    """MindSpore's cache directory of this process. It holds one graph at most: the one that is compiled next.

    MindSpore reads the directory's path once per process, and names its files by the process's rank and role. It loads no graph
    unless the directory holds the hash of the source files that it knows of, and none after it has once compiled a graph.
    """

    def __init__(self, rank: int):
        from mindspore.graph.api import _get_compile_cache_dep_files

        root = Path(tempfile.mkdtemp(prefix="granvit-graphs-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        os.environ["MS_COMPILER_CACHE_PATH"] = str(root)
        self.directory, self.role = root / f"rank_{rank}" / "graph_cache", os.environ.get("MS_ROLE", "")
        self.directory.mkdir(parents=True)
        hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(_get_compile_cache_dep_files())]
        hash_of_hashes = hashlib.sha256("".join(hashes).encode()).hexdigest()
        (self.directory / f"{self.role}compile_dependency.hash").write_text(hash_of_hashes)
        self.number, self.loads = 0, True

    def compile(self, stored: bytes | None, compile_now: Callable[[], None]) -> bytes | None:
        """Runs `compile_now`, which must compile one graph, and lets MindSpore load `stored` instead. Returns the graph if
        MindSpore has compiled it, None if it has loaded `stored`."""
        file = self.directory / f"{self.role}compile_cache_{self.number}.mindir"
        if stored is not None:
            file.write_bytes(stored)
        self.number += 1
        os.environ[SWITCH] = "1"
        try:
            compile_now()
        finally:
            del os.environ[SWITCH]
        if not file.exists():
            raise RuntimeError(f"MindSpore {ms.__version__} did not store a graph as {file}: set runtime.compile_cache to null")
        graph = file.read_bytes()
        file.unlink()
        self.loads = graph == stored
        return None if self.loads else graph


exchange = cache(Exchange)


@cache
def source_digest() -> str:
    """A hash of the source code from which graphs are compiled."""
    digest = hashlib.sha256()
    for package in ("granvit", "ms_granvit"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """The graph in a file; None if there is no file. A damaged file is reported and deleted."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("graph %s cannot be read (%s): compiling it", path, error)
        return None
    if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
        return content[DIGEST:]
    log.warning("graph %s is damaged: deleted, compiling it", path)
    path.unlink(missing_ok=True)
    return None


def _write(path: Path, graph: bytes) -> None:
    """Writes a file under its name only when it is complete: other ranks may write or read the same one."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(graph).digest() + graph)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("graph %s cannot be written (%s): the next start will compile it again", path, error)
        with suppress(OSError):
            temporary.unlink()
