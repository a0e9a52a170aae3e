"""A directory that is made in parts, most of them training runs: what is finished is kept, the rest is made in child processes.

The demo (granvit/demo/command.py) and the pretraining of its start weights (granvit/demo/pretrain.py) are such directories.
"""
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from granvit.config import CONFIGS, RunConfig, dump_config, load_config
from granvit.launch import Framework

Lanes = Sequence[Sequence[str]]  # parts that run one after the other, for each of the lanes that run at the same time


@dataclass(frozen=True)
class Plan:
    """Which parts there are.

    `root` is the directory that the configurations name, `after` gives for each part the one whose result it needs, `seconds` how
    long each takes on 2 cores (to estimate the remaining time), `ranks` the runs with several ranks; others are one process.
    """

    root: Path
    after: dict[str, str | None]
    seconds: dict[str, int]
    ranks: dict[str, int]


class Parts:
    """One directory `root`. A subclass has the plan and makes those parts that are not training runs.

    A training run of a part is `configs/demo/PART.yaml` with its paths moved to `root`. The file `parts.json` in `root` lists the
    finished parts. A part is made again if its configuration, its contents or a part before it changed.
    """

    plan: ClassVar[Plan]

    def __init__(self, root: Path, seed: int, framework: Framework):
        self.root, self.seed, self.framework = root, seed, framework
        self.finished_path = root / "parts.json"
        self.finished: dict[str, dict] = json.loads(self.finished_path.read_text()) if self.finished_path.exists() else {}
        self.children: set[subprocess.Popen] = set()
        self.lock = threading.Lock()

    def contents(self, part: str) -> str | None:
        """What a part depends on that is not a training run; None for a training run."""
        raise NotImplementedError

    def make(self, part: str) -> None:
        """Makes a part that is not a training run, or completes a training run that has just ended."""
        raise NotImplementedError

    def overrides(self, part: str) -> list[str]:
        """`key=value` overrides that put this directory and seed into a run's configuration."""
        config = load_config(CONFIGS / "demo" / f"{part}.yaml")
        moved = lambda path: str(self.root / Path(path).relative_to(self.plan.root))  # noqa: E731
        found = [f"seed={self.seed}", f"output={moved(config.output)}"]
        found += [f"data.sources=[{{path: {moved(config.data.sources[0].path)}}}]"]
        for key in ("weights_vision", "weights_language", "tokenizer", "init_from"):
            if (path := getattr(config.model, key)) is not None and key in config.model.model_fields_set:
                found.append(f"model.{key}={moved(path)}")
        if config.runtime.compile_cache is not None:
            found.append(f"runtime.compile_cache={moved(config.runtime.compile_cache)}")
        return found if config.eval.source is None else [*found, f"eval.source={moved(config.eval.source)}"]

    def config(self, part: str) -> RunConfig:
        return load_config(CONFIGS / "demo" / f"{part}.yaml", self.overrides(part))

    def key(self, part: str) -> str:
        """A hash of all that a part's result depends on."""
        before = self.plan.after[part]
        own = self.contents(part)
        lines = [self.key(before) if before else "", self.framework + dump_config(self.config(part)) if own is None else own]
        return hashlib.sha256("\0".join(lines).encode()).hexdigest()[:16]

    def is_finished(self, part: str) -> bool:
        return self.finished.get(part, {}).get("key") == self.key(part)

    def run(self, groups: Sequence[Lanes], after: Sequence[Lanes] = ()) -> None:
        """Makes the parts that are not finished, one group after the other. The lanes of a group share the cores; on a single
        core they run one after the other. `after` are the groups of a later call, for the estimate of the remaining time.
        `SystemExit` if a part fails."""
        for number, lanes in enumerate(groups):
            seconds = sum(max(self._seconds_left(lane) for lane in later) for later in [*groups[number:], *after])
            if seconds:
                print(f"== about {seconds / 60:.0f} min left on 2 cores", flush=True)
            cores = sorted(os.sched_getaffinity(0))
            if len(lanes) == 1 or len(cores) == 1:
                for lane in lanes:
                    self._run_lane(lane, cores, prefixed=False)
                continue
            shares = [cores[i * len(cores) // len(lanes) : (i + 1) * len(cores) // len(lanes)] for i in range(len(lanes))]
            with ThreadPoolExecutor(len(lanes)) as pool:
                futures = [pool.submit(self._run_lane, *each, True) for each in zip(lanes, shares, strict=True)]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self._interrupt()
                    raise

    def _seconds_left(self, lane: Sequence[str]) -> float:
        return sum(self.plan.seconds[part] for part in lane if not self.is_finished(part))

    def _run_lane(self, lane: Sequence[str], cores: Sequence[int], prefixed: bool) -> None:
        for part in lane:
            if self.is_finished(part):
                print(f"== {part}: already finished, in {self.finished[part]['seconds']:.0f} s", flush=True)
                continue
            print(f"== {part}", flush=True)
            start = time.monotonic()
            if self.contents(part) is None:
                self._train(part, cores, prefixed)
            self.make(part)
            seconds = time.monotonic() - start
            print(f"== {part}: {seconds:.0f} s", flush=True)
            with self.lock:
                self.finished[part] = {"key": self.key(part), "seconds": seconds}
                self.finished_path.write_text(json.dumps(self.finished, indent=1))

    def _interrupt(self) -> None:
        """Asks the runs to save a checkpoint and to end."""
        for child in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)

    def _train(self, part: str, cores: Sequence[int], prefixed: bool) -> None:
        """Runs a part's training on these cores. `prefixed`: its lines begin with the part's name. `SystemExit` if it fails."""
        config = ["--config", CONFIGS / "demo" / f"{part}.yaml", "--framework", self.framework, *self.overrides(part)]
        command = [str(word) for word in (*self._launcher(part), Path(sys.argv[0]).resolve(), "rank", part, *config)]
        print(" ".join(command), flush=True)
        # OMP_NUM_THREADS: each rank has a core. GLOG_v: MindSpore's workers log hundreds of warnings while they connect.
        # MS_RETRY_INTERVAL: their end takes 2 s instead of 7 to 10. PATH: msrun starts the first `python` in it.
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        defaults = {"OMP_NUM_THREADS": "1", "GLOG_v": "3", "MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}
        child = subprocess.Popen(
            command, env={**defaults, **os.environ, "PATH": search}, preexec_fn=lambda: os.sched_setaffinity(0, cores),
            stdout=subprocess.PIPE if prefixed else None, stderr=subprocess.STDOUT if prefixed else None,
            text=True, errors="replace",
        )  # fmt: skip
        self.children.add(child)
        try:
            for line in child.stdout or ():
                print(f"{part}: {line}", end="", flush=True)
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            self.children.discard(child)
        if status:
            raise SystemExit(f"{part} failed (exit status {status}); see the lines above and {self.root / part / 'log'}")

    def _launcher(self, part: str) -> list[str]:
        """The framework's launcher for a run with several ranks, else this Python."""
        ranks, bin_directory = self.plan.ranks.get(part, 1), Path(sys.executable).parent
        if ranks == 1:
            return [sys.executable]
        with socket.socket() as probe:  # finds a free port
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if self.framework == "torch":
            return [str(bin_directory / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port]
        return [str(bin_directory / "msrun"), "--worker_num", str(ranks), "--local_worker_num", str(ranks), "--master_port", port,
                "--bind_core", "True", "--join", "True", "--log_dir", str(self.root / part / "msrun")]  # fmt: skip
