"""Judges one implementation, the candidate, by its errors and those of another, the peer, against a golden reference.

The golden reference is the PyTorch model in float64. The error of a tensor is `|x - golden|` over `|golden|`, once in the
Frobenius norm and once for the largest element. The candidate passes if both of its errors are at most `RATIO` times the peer's
errors at the same precision, or below the floor of that precision. So the tolerance is a multiple of the peer's own error.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from parity.capture import BY, DOCUMENTED, KERNELS, Record, Tensors

RATIO = 4.0
# An error below the floor counts as rounding, whatever the peer's error is. In units of the format's roundoff, for the norm and
# for the largest element. 32 units, because MindSpore's CPU kernels are less accurate than PyTorch's (measured on one call, in
# units: softmax 8.9 against 0.9, log-softmax 6.1 against 0.6, sigmoid 3.7 against 0.6).
FLOOR_UNITS = {"float32": (32.0, 128.0), "bfloat16": (8.0, 32.0), "float16": (8.0, 32.0)}
# Tensors of these kinds went through the whole model and back, and contain the rounding errors of every block: their floor is 8
# times as large. So is that of the suites with many steps. In the suites `NOT_CARRIED`, no error is carried from module to
# module.
CARRIED = ("backward", "gradient", "clipped gradient", "first moment", "second moment")
CARRIED_FACTOR = 8.0
NOT_CARRIED = ("ops", "isolated", KERNELS, DOCUMENTED)  # suites
MANY_STEPS = ("trajectory", "trajectory2")  # suites
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SQUARES = ("second moment",)  # a square doubles the relative error, so its floor is doubled
# If the peer's own error exceeds this many units, it is not rounding: the peer is wrong, and the tensor fails.
PEER_UNITS = 2.0**14
# A gradient whose true value is zero (that of a bias on attention keys: softmax ignores a shift) consists of rounding errors. If
# a golden norm is below this share of the largest one in its layer, the largest one is the scale of its error.
ZERO = 1e-6


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor. Errors are relative, `(Frobenius, largest element)`. `reason`: why it failed, or empty."""

    suite: str
    kind: str
    name: str
    shape: tuple[int, ...]
    peer_error: tuple[float, float]
    error: tuple[float, float]
    limit: tuple[float, float]
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason

    @property
    def badness(self) -> float:
        """The error divided by its limit; above 1 for every failure, infinite if the error is within its limit."""
        ratio = max(e / limit for e, limit in zip(self.error, self.limit, strict=True))
        return ratio if self.passed or ratio > 1 else float("inf")


def compare_records(golden: Record, peer: Record, candidate: Record) -> Iterator[Row]:
    """A row for every tensor of every suite, in the golden record's order (order of execution)."""
    for suite in golden.suites:
        if suite == KERNELS:
            for name, compute in ((KERNELS, candidate.compute), (DOCUMENTED, "float16")):
                for record in (candidate, peer):
                    yield from compare_kernels(name, golden.suites["ops"], peer.suites["ops"], record, compute)
            continue
        yield from compare_suite(suite, golden.suites[suite], peer.suites.get(suite, {}), candidate.suites.get(suite, {}),
                                 candidate.compute)  # fmt: skip


def compare_kernels(suite: str, golden: Tensors, peer: Tensors, record: Record, compute: str) -> Iterator[Row]:
    """A row for every tensor of every implementation in a suite of `record`, against the golden operators; `peer` is PyTorch's
    default implementation."""
    made = record.suites.get(suite, {})
    bases = {key: key.rpartition(BY)[0] for key in made}
    golden, peer = ({key: of[base] for key, base in bases.items()} for of in (golden, peer))
    yield from compare_suite(f"{suite}, {record.framework}", golden, peer, made, compute)


def compare_suite(suite: str, golden: Tensors, peer: Tensors, candidate: Tensors, compute: str,
                  peer_name: str = "PyTorch") -> Iterator[Row]:  # fmt: skip
    """As `compare_records`, for one suite. A missing or an additional name is a failure."""
    scales = layer_scales(golden)
    plain = tuple(units * ROUNDOFF[compute] for units in FLOOR_UNITS[compute])
    for key in [*golden, *(k for k in candidate if k not in golden)]:
        kind, _, name = key.partition("/")
        carried = suite in MANY_STEPS or (kind in CARRIED and not suite.startswith(NOT_CARRIED))
        floors = tuple((CARRIED_FACTOR if carried else 1.0) * (2.0 if kind in SQUARES else 1.0) * floor for floor in plain)
        nothing = (np.nan, np.nan)
        sides = (("the golden record", golden), (peer_name, peer), ("the candidate", candidate))
        reason = next((f"not in {side}" for side, of in sides if key not in of), "")
        if reason:
            yield Row(suite, kind, name, (), nothing, nothing, floors, reason)
            continue
        reference, a, b = golden[key], peer[key], candidate[key]
        if reference.shape != b.shape or reference.shape != a.shape:
            reason = f"shape {b.shape}, golden {reference.shape}"
            yield Row(suite, kind, name, reference.shape, nothing, nothing, floors, reason)
            continue
        if kind == "tokens":
            peer_share, differing = (float((x != reference).mean()) for x in (a, b))
            reason = "" if differing == 0 else f"{differing:.0%} of the tokens differ"
            yield Row(suite, kind, name, reference.shape, (peer_share, peer_share), (differing, differing), floors, reason)
            continue
        peer_error, error = (errors(x, reference, scales[key]) for x in (a, b))
        limit = tuple(max(RATIO * e, floor) if np.isfinite(e) else floor for e, floor in zip(peer_error, floors, strict=True))
        reason = ""
        if not np.isfinite(b).all():
            reason = "NaN or infinity"
        elif not max(peer_error) <= PEER_UNITS * ROUNDOFF[compute]:
            reason = f"{peer_name} itself differs from the golden values by more than rounding"
        elif any(e > most for e, most in zip(error, limit, strict=True)):
            reason = "diverged"
        yield Row(suite, kind, name, reference.shape, peer_error, error, limit, reason)


def errors(x: np.ndarray, golden: np.ndarray, scale: tuple[float, float]) -> tuple[float, float]:
    """`|x - golden|` over the scale: Frobenius norm, largest element."""
    difference = np.abs(x.astype(np.float64) - golden)
    found = np.sqrt(np.square(difference).sum()), difference.max(initial=0.0)
    return tuple(float(d / s) if s > 0 else (0.0 if d == 0 else np.inf) for d, s in zip(found, scale, strict=True))


def layer_scales(golden: Tensors) -> dict[str, tuple[float, float]]:
    """The scale of each tensor's error: its own norm and largest element, or the largest in its layer if its true value is zero.

    A layer consists of the tensors of one kind and one number of axes whose names are equal up to the last two parts
    (`...self_attn.k_proj.bias` and `...self_attn.q_proj.bias`).
    """
    sizes = {k: (float(np.linalg.norm(g.astype(np.float64).ravel())), float(np.abs(g).max(initial=0))) for k, g in golden.items()}
    largest: dict[tuple[str, int], tuple[float, float]] = {}
    for key, size in sizes.items():
        layer = _layer(key, golden[key])
        largest[layer] = max(largest.get(layer, size), size)
    of_layer = {key: largest[_layer(key, golden[key])] for key in sizes}
    return {key: of_layer[key] if size[0] < ZERO * of_layer[key][0] else size for key, size in sizes.items()}


def _layer(key: str, array: np.ndarray) -> tuple[str, int]:
    return (key.rsplit(".", 2)[0] if key.count(".") >= 2 else key, array.ndim)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one suite. `first` is the first failed row in order of execution."""

    suite: str
    compared: int
    failed: int
    worst: Row
    first: Row | None


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """One verdict for each suite, in order."""
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row.suite, []).append(row)
    found = []
    for suite, rows_of_suite in by_suite.items():
        failures = [row for row in rows_of_suite if not row.passed]
        worst = max(rows_of_suite, key=lambda row: row.badness)
        found.append(Verdict(suite, len(rows_of_suite), len(failures), worst, failures[0] if failures else None))
    return found
