"""Agreement between ranks: texts sent from one rank to all, errors raised on all ranks together, values compared.

Texts are sent with the sum over ranks (`Ranks.all_sum`), because MindSpore's `ops.Broadcast` does not exist on CPU. The sending
rank puts the bytes into a float32 vector of fixed length, the other ranks add zeros: the sum is exact, and MindSpore compiles one
graph. If one rank fails, or holds another value than rank 0, all ranks log the same line and stop.
"""
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np

from granvit.engine import Ranks

CHUNK = 4096  # bytes sent by one sum
NAMED = 8  # at most so many differing facts, and so many differing ranks, are named in one line
log = logging.getLogger("granvit")
Result = TypeVar("Result")


class Refused(ValueError):
    """The run cannot start, because one rank failed or differs. All ranks raise it with the same line and have logged it."""


class Fact(NamedTuple):
    """A value that must be equal on all ranks, and the file that it was read from (empty: no file)."""

    value: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.path})" if self.path else self.value


def ranks_where(ranks: Ranks, flag: bool) -> list[int]:
    """The ranks whose flag is set, in ascending order; the same list on every rank. All ranks must call it."""
    flags = np.zeros(ranks.world, np.float32)
    flags[ranks.rank] = flag
    return np.flatnonzero(ranks.all_sum(flags)).tolist()


def broadcast(ranks: Ranks, text: str, speaker: int) -> str:
    """The text of rank `speaker`, on every rank; the `text` of other ranks is ignored. All ranks must call it."""
    data = text.encode() if ranks.rank == speaker else b""
    message = len(data).to_bytes(8, "little") + data
    first = _sum_bytes(ranks, message[:CHUNK])
    total = 8 + int.from_bytes(first[:8], "little")
    chunks = [first] + [_sum_bytes(ranks, message[start : start + CHUNK]) for start in range(CHUNK, total, CHUNK)]
    return b"".join(chunks)[8:total].decode()


def _sum_bytes(ranks: Ranks, data: bytes) -> bytes:
    """`CHUNK` bytes: those of the one rank whose `data` is not empty, padded with zeros."""
    vector = np.zeros(CHUNK, np.float32)
    vector[: len(data)] = np.frombuffer(data, np.uint8)
    return ranks.all_sum(vector).astype(np.uint8).tobytes()


def together(ranks: Ranks, work: Callable[[], Result], waiting: str = "") -> Result:
    """Runs `work` on every rank and returns its result once all ranks have finished. All ranks must call it.

    If `work` raises `ValueError` or `OSError` on any rank, every rank raises `Refused` with the message of the lowest failing
    rank. `waiting` is a text for the log: what this rank is waiting for once its own work is done.
    """
    if ranks.world == 1:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as failure:  # sent to the other ranks below
        error = failure
    if waiting:
        log.info(f"waiting for the other ranks: {waiting}")
    failed = ranks_where(ranks, error is not None)
    if failed:
        line = broadcast(ranks, f"{error}" if len(failed) == ranks.world else f"{_here(ranks)}: {error}", failed[0])
        _refuse(ranks, line, error)
    return result


def agree(ranks: Ranks, facts: Mapping[str, Fact]) -> None:
    """Compares `facts` (name -> value) of every rank with those of rank 0. All ranks must call it.

    If a rank differs, every rank raises `Refused`: the line names that rank, the differing facts, both values and the files that
    they were read from. A fact that a rank lacks has the value "nothing".
    """
    if ranks.world == 1:
        return
    stated = json.loads(broadcast(ranks, json.dumps(facts), 0))
    facts_of_rank_0 = {what: Fact(*fact) for what, fact in stated.items()}
    nothing = Fact("nothing")
    pairs = [(what, facts.get(what, nothing), facts_of_rank_0.get(what, nothing)) for what in {**facts_of_rank_0, **facts}]
    unequal = ((what, own, other) for what, own, other in pairs if own.value != other.value)
    differences = [f"{what} {own} on rank {ranks.rank}, {other} on rank 0" for what, own, other in unequal]
    differing = ranks_where(ranks, bool(differences))
    if not differing:
        return
    more = f"; and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
    others = f" ({len(differing) - 1} more do: {', '.join(map(str, differing[1:NAMED]))})" if len(differing) > 1 else ""
    line = f"{_here(ranks)} differs from rank 0{others}: {'; '.join(differences[:NAMED])}{more}"
    _refuse(ranks, broadcast(ranks, line, differing[0]), None)


def _here(ranks: Ranks) -> str:
    return f"rank {ranks.rank} on {socket.gethostname()}"


def _refuse(ranks: Ranks, line: str, cause: Exception | None) -> NoReturn:
    """Logs the line on every rank (rank 0 also on the console) and raises `Refused` with it.

    The ranks wait for each other in between: a launcher kills the remaining ranks as soon as one has ended.
    """
    log.error(f"error: {line}", extra={"file_only": ranks.rank > 0})
    ranks_where(ranks, True)
    raise Refused(line) from cause
