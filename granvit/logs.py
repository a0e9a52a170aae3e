"""The log files of a run: one text log per rank, `metrics.jsonl`, TensorBoard event files."""
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from granvit.checkpoint.tensors import write_synced
from granvit.kernels import Kernels

log = logging.getLogger("granvit")


class Console(logging.Handler):
    """Prints to the current `sys.stderr`, which the live progress line replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def to_console(rank: int) -> None:
    """Sends messages of rank 0 and errors of all ranks to stderr."""
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = Console()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Records with `file_only` (such as tracebacks) are written to the log file alone.
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    log.handlers = [handler]


def to_file(run: Path, rank: int) -> None:
    """Also appends all messages of this rank to its file in RUN/log, for example rank_00000.txt."""
    path = run / "log" / f"rank_{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def log_kernels(kernels: Kernels) -> None:
    """One line with the implementations that were picked, and a warning for each that this machine lacks."""
    log.info(f"kernels: {', '.join(f'{operator}: {name}' for operator, name in kernels.names.items())}")
    for hint in kernels.hints:
        log.warning(f"not used here: {hint}")


def read_metrics(path: Path, last_step: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a metrics.jsonl up to `last_step`, each with its object. It ends before an incomplete line, which a run
    wrote that was killed, and at once if there is no file."""
    if not path.exists():
        return
    with open(path, errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                if record["step"] > last_step:
                    return
            except (ValueError, KeyError, TypeError):
                return
            yield line, record


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line and step, floats in the shortest form that reads back exactly.

    Two kinds of objects have no `loss`: a step that was left out has `non_finite`; an evaluation has `held_out` and follows the
    object of its step. `last` is the newest object in the file, or empty.
    """

    def __init__(self, path: Path, after_step: int):
        """Opens the file for appending. Lines of steps after `after_step`, which a resumed run repeats, are deleted first."""
        kept = list(read_metrics(path, after_step))
        self.last: dict[str, Any] = kept[-1][1] if kept else {}
        temporary = path.with_name(f".{path.name}.tmp")
        write_synced(temporary, "".join(line.rstrip("\n") + "\n" for line, _ in kept))
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object and flushes the file."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self.last = record

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in RUN/tensorboard. TensorBoard hides the points that an interrupted run wrote for steps after `after_step`."""

    def __init__(self, directory: Path, after_step: int):
        self._writer = EventFileWriter(str(directory))
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START), step=after_step + 1))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one point to each curve."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
