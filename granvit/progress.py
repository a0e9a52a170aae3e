"""The progress line: updated in place on a terminal, otherwise one log line every `log_every` steps."""
from collections import deque
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live

from granvit.logs import log

WINDOW = 50  # rates are averaged over this many steps


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step, seconds of it spent waiting for data, and numbers of questions and row tokens in the global batch."""

    seconds: float
    waiting: float
    questions: float
    row_tokens: float


class Progress:
    """Shows losses, rates over the last steps and the time left; `close` ends the live line."""

    def __init__(self, steps: int, log_every: int):
        self.steps, self.log_every = steps, log_every
        self.recent: deque[StepTimes] = deque(maxlen=WINDOW)
        self.held_out: float | None = None  # the newest held-out loss
        console = Console(stderr=True)
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        if self.live:
            self.live.start()

    def step(self, record: dict, times: StepTimes) -> None:
        """Adds one step (`record` as in metrics.jsonl) and shows the line if it is due. A step that was left out is not shown."""
        self.recent.append(times)
        if "loss" not in record:
            return
        if self.live:
            self.live.update(self.line(record))
        elif record["step"] % self.log_every == 0 or record["step"] in (1, self.steps):
            log.info(self.line(record))

    def line(self, record: dict) -> str:
        """Loss parts, newest held-out loss, learning rate, questions/s, tokens/s, share of time waiting for data, time left."""
        seconds = max(sum(t.seconds for t in self.recent), 1e-9)
        left = (self.steps - record["step"]) * seconds / len(self.recent)
        held_out = "" if self.held_out is None else f"held-out {self.held_out:.4f}  "
        return (
            f"step {record['step']}/{self.steps}  loss {record['loss']:.4f} = caption {record['loss_caption']:.4f}, "
            f"distill {record['loss_distill']:.4f}  {held_out}grad {record['grad_norm']:.3g}  lr {record['lr']:.3g}  "
            f"{sum(t.questions for t in self.recent) / seconds:.1f} questions/s  "
            f"{sum(t.row_tokens for t in self.recent) / seconds:.0f} tokens/s  "
            f"data {sum(t.waiting for t in self.recent) / seconds:.0%}  left {_duration(left)}"
        )

    def close(self) -> None:
        if self.live:
            self.live.stop()


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


