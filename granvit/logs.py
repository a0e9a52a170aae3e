"""What a run writes down: one log per rank, `metrics.jsonl`, TensorBoard event files."""
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

log = logging.getLogger("granvit")


class Console(logging.Handler):
    """Prints to whatever stderr is at the time: a live progress line puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def to_console(rank: int) -> None:
    """Messages of rank 0, and errors of every rank, go to stderr."""
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = Console()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # A traceback belongs in the file; the console shows the message.
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    log.handlers = [handler]


def to_file(run: Path, rank: int) -> None:
    """All messages of this rank go to RUN/log/rank_00000.txt too, after those of earlier starts."""
    path = run / "log" / f"rank_{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


class MetricsFile:
    """`metrics.jsonl`: one object per step, floats in Python's shortest form that reads back exactly.

    An object without `loss` is no step's loss: one with `non_finite` is a step that was left out, one with `held_out` follows the
    object of the step after which the model was evaluated. `last` is the newest object (of an earlier start too), or empty.
    """

    def __init__(self, path: Path, after_step: int):
        """Opens for appending behind `after_step`; later lines (of steps that a resumed run repeats) are cut off."""
        kept_lines = []
        self.last: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    if record["step"] > after_step:
                        break
                except (ValueError, KeyError, TypeError):
                    break  # the line that a killed run was writing
                kept_lines.append(line + "\n")
                self.last = record
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w") as file:
            file.writelines(kept_lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object and hands it to the system."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self.last = record

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in RUN/tensorboard. What an interrupted run wrote behind `after_step` is hidden by TensorBoard."""

    def __init__(self, directory: Path, after_step: int):
        self._writer = EventFileWriter(str(directory))
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START), step=after_step + 1))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one point to each curve."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
