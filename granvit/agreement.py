"""What the ranks tell each other in words: short texts over the one sum that every framework has.

Bytes travel as float32 numbers in vectors of one length, of which all ranks but the speaker's are zero: exact, and one graph in
MindSpore, whose `ops.Broadcast` does not exist on CPU. An error that one rank meets, or a fact in which one rank differs, becomes
the same line on every rank, and all stop.
"""
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np

from granvit.engine import Ranks

CHUNK = 4096  # bytes that one sum carries
NAMED = 8  # differing facts, and ranks that differ, that one line names
log = logging.getLogger("granvit")
Result = TypeVar("Result")


class Refused(ValueError):
    """The ranks cannot begin together; every one of them has logged the same line."""


class Fact(NamedTuple):
    """A value that all ranks must share, and the file that it was read from (empty: none)."""

    value: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.path})" if self.path else self.value


def ranks_where(ranks: Ranks, flag: bool) -> list[int]:
    """The ranks whose flag is set, rising; the same list on every rank. All ranks must call it."""
    flags = np.zeros(ranks.world, np.float32)
    flags[ranks.rank] = flag
    return np.flatnonzero(ranks.all_sum(flags)).tolist()


def broadcast(ranks: Ranks, text: str, speaker: int) -> str:
    """The speaker's text, on every rank; what the others pass is not looked at. All ranks must call it."""
    data = text.encode() if ranks.rank == speaker else b""
    message = len(data).to_bytes(8, "little") + data
    first = _sum_bytes(ranks, message[:CHUNK])
    total = 8 + int.from_bytes(first[:8], "little")
    chunks = [first] + [_sum_bytes(ranks, message[start : start + CHUNK]) for start in range(CHUNK, total, CHUNK)]
    return b"".join(chunks)[8:total].decode()


def _sum_bytes(ranks: Ranks, data: bytes) -> bytes:
    """The bytes of the one rank that has any, filled up with zeros."""
    vector = np.zeros(CHUNK, np.float32)
    vector[: len(data)] = np.frombuffer(data, np.uint8)
    return ranks.all_sum(vector).astype(np.uint8).tobytes()


def together(ranks: Ranks, work: Callable[[], Result], waiting: str = "") -> Result:
    """What `work` returns, once it has returned on every rank. `Refused` on every rank where it raised `ValueError` or `OSError`
    on any: the line is that of the failing rank with the lowest number. `waiting` says for the log what this rank waits for once
    its own work is done, where that may take long."""
    if ranks.world == 1:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as failure:  # told to the other ranks below
        error = failure
    if waiting:
        log.info(f"waiting for the other ranks: {waiting}")
    failed = ranks_where(ranks, error is not None)
    if failed:
        line = broadcast(ranks, f"{error}" if len(failed) == ranks.world else f"{_here(ranks)}: {error}", failed[0])
        _refuse(ranks, line, error)
    return result


def agree(ranks: Ranks, facts: Mapping[str, Fact]) -> None:
    """`Refused` on every rank where one of them holds another value than rank 0: the line names that rank, what differs, both
    values and where they were read. The ranks state the same facts, or a fact that is not stated is "nothing"."""
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
    """Logs the line on every rank, rank 0's on the console too, and raises it when all have: a launcher kills the ranks that are
    left as soon as one has gone."""
    log.error(f"error: {line}", extra={"file_only": ranks.rank > 0})
    ranks_where(ranks, True)
    raise Refused(line) from cause
