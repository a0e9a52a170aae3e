"""A directory that is made in parts, most of them training runs: what is finished is kept, the rest is made in child processes.

The demo (granvit/demo/command.py) and the pretraining of its start weights (granvit/demo/pretrain.py) are such directories.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from granvit.checkpoint.tensors import write_synced
from granvit.child_runs import is_complete, launcher, start, stop
from granvit.config import CONFIGS, RunConfig, dump_config, load_config
from granvit.launch import Framework
from granvit.trainer import TrainingStopped

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

    A training run of a part is `configs/demo/PART.yaml` with its paths moved to `root`, on the CPU. The file `parts.json` in
    `root` lists the parts that were started, and their times once they are finished. A part is made again if its configuration,
    its contents or a part before it changed; its earlier training run is then removed. An interrupted run is resumed.
    """

    plan: ClassVar[Plan]

    def __init__(self, root: Path, seed: int, framework: Framework):
        self.root, self.seed, self.framework = root, seed, framework
        self.records_path = root / "parts.json"
        self.records: dict[str, dict] = self._read_records()
        self.children: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopping = False  # no further part of a lane is started

    def _read_records(self) -> dict[str, dict]:
        try:
            return json.loads(self.records_path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise ValueError(f"{self.records_path} is damaged; remove {self.root} and start again") from None

    def _record(self, part: str, **record: object) -> None:
        """Sets what parts.json says of a part. The file is replaced as a whole."""
        with self.lock:
            self.records[part] = record
            temporary = self.records_path.with_suffix(".tmp")
            write_synced(temporary, json.dumps(self.records, indent=1) + "\n")
            os.replace(temporary, self.records_path)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each finished part took."""
        return {part: record["seconds"] for part, record in self.records.items() if self.is_finished(part)}

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
        found = [f"seed={self.seed}", f"output={moved(config.output)}", "runtime.device=cpu"]
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
        record = self.records.get(part, {})
        return "seconds" in record and record["key"] == self.key(part)

    def run(self, groups: Sequence[Lanes], after: Sequence[Lanes] = ()) -> None:
        """Makes the parts that are not finished, one group after the other. The lanes of a group share the cores; on a single
        core they run one after the other. `after` are the groups of a later call, for the estimate of the remaining time.
        `SystemExit` if a part fails; `TrainingStopped` on Ctrl-C or SIGTERM (as `KeyboardInterrupt`), once the runs have saved
        their checkpoints."""
        try:
            self._run_groups(groups, after)
        except KeyboardInterrupt:
            raise TrainingStopped("interrupted; the runs have saved what they had, and the same command continues") from None

    def _run_groups(self, groups: Sequence[Lanes], after: Sequence[Lanes]) -> None:
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
                done: set[Future[None]] = set()
                others = set(futures)
                try:
                    done, others = wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    if others:
                        self.stopping = True
                        stop(self.children.copy())
                for future in (*done, *others):  # the one that failed first
                    future.result()

    def _seconds_left(self, lane: Sequence[str]) -> float:
        return sum(self.plan.seconds[part] for part in lane if not self.is_finished(part))

    def _run_lane(self, lane: Sequence[str], cores: Sequence[int], prefixed: bool) -> None:
        for part in lane:
            if self.is_finished(part):
                print(f"== {part}: already finished, in {self.seconds[part]:.0f} s", flush=True)
                continue
            if self.stopping:
                return
            print(f"== {part}", flush=True)
            began, key = time.monotonic(), self.key(part)
            if self.contents(part) is None:
                if self.records.get(part, {}).get("key", key) != key and (self.root / part).exists():
                    print(f"== {part}: what it depends on has changed; the earlier run is removed", flush=True)
                    shutil.rmtree(self.root / part)
                self._record(part, key=key)
                self._train(part, cores, prefixed)
            self.make(part)
            seconds = time.monotonic() - began
            print(f"== {part}: {seconds:.0f} s", flush=True)
            self._record(part, key=key, seconds=seconds)

    def _train(self, part: str, cores: Sequence[int], prefixed: bool) -> None:
        """Runs a part's training on these cores. `prefixed`: its lines begin with the part's name. `SystemExit` if it fails or
        was asked to stop."""
        directory = self.root / part
        words = ["--config", CONFIGS / "demo" / f"{part}.yaml", "--framework", self.framework, *self.overrides(part)]
        first = launcher(self.framework, self.plan.ranks.get(part, 1), directory / "msrun", bind_cores=True)
        command = [str(word) for word in (*first, Path(sys.argv[0]).resolve(), "rank", part, *words)]
        print(" ".join(command), flush=True)
        child = start(command, cores, subprocess.PIPE if prefixed else None)
        self.children.add(child)
        if self.stopping:  # since the lane looked
            stop([child])
        try:
            for line in child.stdout or ():
                print(f"{part}: {line}", end="", flush=True)
            status = child.wait()
        except KeyboardInterrupt:
            stop([child])
            raise
        finally:
            self.children.discard(child)
        if status:
            raise SystemExit(f"{part} failed (exit status {status}); see the lines above and {directory / 'log'}")
        if not is_complete(directory):
            raise SystemExit(f"{part} stopped before its last step; the same command continues")
