"""Checks 2 to 6: every implementation of every operator against float64, adjoint tests, attention's head width and mask, classes
of error. All of them work on one row of the table, so that one that ends the process takes no other with it."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from bench_kernels import Call

from granvit import kernels
from granvit.kernels import COMPOSED, OPERATORS
from parity.compare import FLOOR_UNITS, ROUNDOFF, compare_suite, errors
from parity.compare import Row as Compared
from selftest.calls import SEGMENTS, Known, Side, attention_call, bind, exact, known, run
from selftest.formulas import Arrays, allowed
from selftest.rows import ABSENT, FAILED, NOTED, Row, verdict

LINEAR = ("roi_align", "rope")  # in their first array
DIRECTIONS, STEP = 4, 3e-7  # of the derivatives along random directions. RMSNorm has rows as small as the root of its epsilon
# The error of a derivative along one random direction is about that of the gradient's norm, but may be a few times as large.
ALONG = 4.0
MOST_NUMBERS = 1 << 18  # in the arrays of a call: derivatives of larger ones would take long, and `values` compares them whole
TOLD_AS_CLASSES = ("bfloat16", "float16")
LARGE = 100.0  # what is added to hidden keys and values
PADDED = 80  # the width to which fused kernels pad heads of 72


@dataclass(frozen=True)
class Check:
    """One check: `run()` returns its row, or raises."""

    check: str
    what: str
    run: Callable[[], Row]


def table_rows(side: Side) -> list[kernels.Row]:
    """The implementations in the table of a framework, by operator."""
    return sorted(side.kernels(side.dtypes[0]).table, key=lambda row: OPERATORS.index(row.operator))


def checks(side: Side, row: kernels.Row) -> Iterator[Check]:
    """The checks of one implementation, or one that says why it does not run here."""
    dtypes = [dtype for dtype in side.dtypes if not row.unfit(side.device, dtype)]
    if row.operator == "adamw":
        dtypes = dtypes[:1]  # the optimizer's arrays are in float32 in every run
    reason = row.unfit(side.device, side.dtypes[0]) if not dtypes else row.missing() or ""
    if reason:
        what = f"{row.operator} {row.name}"
        yield Check("values", what, partial(Row, "values", what, ABSENT, note=reason))
        return
    for dtype in dtypes:
        what = f"{row.operator} {row.name} {dtype}"
        trial = composed_trial(side, row.operator, dtype) if row.name == COMPOSED else Trial(side, row, dtype)
        yield Check("values", what, partial(trial.values, what))
        if row.operator != "adamw":
            yield Check("adjoint", what, partial(trial.adjoint, what))
        if dtype in TOLD_AS_CLASSES:
            yield Check("error class", what, partial(trial.error_class, what))
        if row.operator == "attention":
            yield Check("72 as 80", what, partial(trial.head_width, what))
            yield Check("mask", what, partial(trial.mask, what))


class Trial:
    """An implementation in one dtype."""

    def __init__(self, side: Side, row: kernels.Row, dtype: str):
        self.side, self.row, self.dtype = side, row, dtype
        self.found: list[tuple[Known, Arrays, Arrays]] = []

    def results(self) -> list[tuple[Known, Arrays, Arrays]]:
        """Every call that the implementation takes, with the outputs and gradients that it returns."""
        if not self.found:  # all of them or none: a call that raises must not leave the checks after it with fewer
            taken = [case for case in known(self.row.operator, self.dtype) if not self.row.cannot(**case.call.sizes)]
            self.found = [(case, *self.outcome(case.call)) for case in taken]
        return self.found

    def outcome(self, call: Call) -> tuple[Arrays, Arrays]:
        return run(self.side, bind(self.side, self.row, self.dtype, call), call)

    def compared(self) -> list[Compared]:
        """Every output and gradient, compared as parity compares kernels: the limit is a multiple of the error of `composed`, or
        that of rounding. `composed` itself must have errors of rounding."""
        verdicts: list[Compared] = []
        peers = {} if self.row.name == COMPOSED else by_composed(self.side, self.row.operator, self.dtype)
        for case, outputs, gradients in self.results():
            golden = named(case.call, case.outputs, case.gradients)
            peer = peers.get(case.call.label, golden)
            verdicts += compare_suite("ops", golden, peer, named(case.call, outputs, gradients), self.dtype, COMPOSED)
        return verdicts

    def values(self, what: str) -> Row:
        """The error of the worst output or gradient, in units of the dtype's roundoff."""
        compared = self.compared()
        if not compared:
            refused = {self.row.cannot(**case.call.sizes) for case in known(self.row.operator, self.dtype)}
            return Row("values", what, ABSENT, note="; ".join(sorted(refused)))
        worst = max(compared, key=lambda c: c.badness)
        error, limit = max(zip(worst.error, worst.limit, strict=True), key=lambda pair: pair[0] / pair[1])
        unit = ROUNDOFF[self.dtype]
        note = "; ".join(f"{c.kind} {c.name}: {c.reason}" for c in compared if c.reason)
        details = {f"{c.kind} {c.name}": [e / unit for e in c.error] for c in compared}
        row = verdict("values", what, error / unit, limit / unit, note, tensors=details)
        return replace(row, result=FAILED) if note else row

    def adjoint(self, what: str) -> Row:
        """Linear operators: `<A x, y> = <x, A^T y>`. The others: the gradient along random directions against a central
        difference of the formula in float64, in which no gradient written by hand takes part."""
        unit, floor = ROUNDOFF[self.dtype], FLOOR_UNITS[self.dtype][0]
        worst = 0.0
        for case, outputs, gradients in self.results():
            if sum(x.size for x in case.call.arrays) > MOST_NUMBERS:
                continue
            differences = linear_gap if self.row.operator in LINEAR else derivative_gap
            worst = max(worst, differences(self.row.operator, case, outputs, gradients) / unit)
        limit = floor if self.row.operator in LINEAR else ALONG * floor
        return verdict("adjoint", what, worst, limit)

    def error_class(self, what: str) -> Row:
        """The largest errors of values and of gradients, beside those of `composed`, in units rounded up to a power of 4."""
        found: dict[str, list[float]] = {"values": [0.0, 0.0], "gradients": [0.0, 0.0]}
        for c in self.compared():
            kind = found["values" if c.kind == "forward" else "gradients"]
            kind[0], kind[1] = (max(a, max(b) / ROUNDOFF[self.dtype]) for a, b in zip(kind, (c.error, c.peer_error), strict=True))
        own, other = (", ".join(f"{kind} {power_of_4(pair[i])}" for kind, pair in found.items()) for i in (0, 1))
        other = "" if self.row.name == COMPOSED else f"{COMPOSED}: {other}"
        return Row("error class", what, NOTED, own, "", other, details=found)

    def head_width(self, what: str) -> Row:
        """Heads of 72 against the same padded with zeros to 80, at the scale of 72: outputs and gradients."""
        plain = attention_call(self.dtype, 72, 2, 2, np.array([[0] * 9 + [1] * 24], np.int32), 33, 1)
        scale = (PADDED / 72) ** 0.5  # in the queries: an implementation takes the scale from the width

        def pad(x: np.ndarray, factor: float = 1.0) -> np.ndarray:
            wide = np.pad(x.astype(np.float64) * factor, [(0, 0)] * 3 + [(0, PADDED - 72)])
            return wide.astype(x.dtype)

        q, k, v = plain.arrays
        sizes = {**plain.sizes, "head_dim": PADDED}
        padded = replace(plain, arrays=[pad(q, scale), pad(k), pad(v)], out=[(*q.shape[:3], PADDED)], sizes=sizes,
                         cotangent=pad(plain.cotangent))  # fmt: skip
        refused = self.row.cannot(**plain.sizes) or self.row.cannot(**sizes)
        if refused:
            return Row("72 as 80", what, ABSENT, note=refused)
        (out,), gradients = self.outcome(plain)
        (wide,), wide_gradients = self.outcome(padded)
        wide_gradients = [wide_gradients[0].astype(np.float64) * scale, *wide_gradients[1:]]
        worst = (0.0, 0.0)
        for narrow, broad in zip([out, *gradients], [wide, *wide_gradients], strict=True):
            narrow = narrow.astype(np.float64)
            pair = errors(broad, np.pad(narrow, [(0, 0)] * 3 + [(0, PADDED - 72)]), sizes_of(narrow))
            worst = (max(worst[0], pair[0]), max(worst[1], pair[1]))
        return self.within(what, "72 as 80", worst)

    def mask(self, what: str) -> Row:
        """Hidden keys and values do not matter, those that are seen do; hidden ones have no gradient. The outputs are those of a
        softmax in float64, with the mask and without one."""
        call = attention_call(self.dtype, 16, 4, 2, SEGMENTS, SEGMENTS.shape[1], 2)
        unmasked = attention_call(self.dtype, 16, 4, 4, None, 37, 3)
        worst, notes = (0.0, 0.0), []
        if refused := self.row.cannot(**call.sizes):
            return Row("mask", what, ABSENT, note=refused)
        bound = bind(self.side, self.row, self.dtype, call)
        (out,), _ = run(self.side, bound, call)
        worst = self.against_softmax(call, out)
        if self.row.cannot(**unmasked.sizes):
            notes.append("it does not run without a mask")
        else:
            worst = tuple(map(max, worst, self.against_softmax(unmasked, *self.outcome(unmasked)[0])))  # type: ignore[assignment]
        seen_BSS = allowed(call.segments_BS)[:, 0]
        question, prefix_end = call.segments_BS == 1, np.arange(call.segments_BS.shape[1])[None] == 4
        for keys_BS in (question, np.broadcast_to(prefix_end, question.shape)):
            (other,), _ = run(self.side, bound, changed(call, keys_BS, self.dtype))
            sees_BS = (seen_BSS & keys_BS[:, None]).any(-1)
            scale = sizes_of(out)
            still, moved = (x.astype(np.float64).swapaxes(1, 2)[at] for x, at in ((out, ~sees_BS), (other, ~sees_BS)))
            worst = tuple(map(max, worst, errors(moved, still, scale)))  # type: ignore[assignment]
            same = (out.astype(np.float64) == other.astype(np.float64)).all(-1).swapaxes(1, 2)[sees_BS]
            if same.any():
                notes.append(f"{same.sum()} queries do not notice another key that they must see")
        asked_BS = call.segments_BS == 2
        only = np.where(asked_BS[:, None, :, None], call.cotangent.astype(np.float64), 0).astype(call.cotangent.dtype)
        one = replace(call, cotangent=only)
        _, (_, *of_keys) = run(self.side, bound, one)
        hidden_BS = ~(seen_BSS & asked_BS[..., None]).any(1)
        for gradient in of_keys:
            leaked = np.where(hidden_BS[:, None, :, None], gradient.astype(np.float64), 0)
            worst = tuple(map(max, worst, errors(leaked, np.zeros_like(leaked), sizes_of(gradient))))  # type: ignore[assignment]
        row = self.within(what, "mask", worst, "; ".join(notes))
        return replace(row, result=FAILED) if any("must see" in note for note in notes) else row

    def against_softmax(self, call: Call, out: np.ndarray) -> tuple[float, float]:
        (golden,), _ = exact("attention", call)
        return errors(out, golden, sizes_of(golden))

    def within(self, what: str, check: str, pair: tuple[float, float], note: str = "") -> Row:
        """The row of errors (Frobenius norm, largest element) that may be those of rounding."""
        unit, floors = ROUNDOFF[self.dtype], FLOOR_UNITS[self.dtype]
        error, limit = max(zip(pair, floors, strict=True), key=lambda item: item[0] / item[1])
        return verdict(check, what, error / unit, limit, note)


@cache
def composed_trial(side: Side, operator: str, dtype: str) -> Trial:
    """The trial of `composed`, whose results are also those that others are compared with."""
    row = next(row for row in side.kernels(dtype).table if (row.operator, row.name) == (operator, COMPOSED))
    return Trial(side, row, dtype)


def by_composed(side: Side, operator: str, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """What `composed` returns for every call of an operator, by the call's label."""
    results = composed_trial(side, operator, dtype).results()
    return {case.call.label: named(case.call, outputs, gradients) for case, outputs, gradients in results}


def named(call: Call, outputs: Arrays, gradients: Arrays) -> dict[str, np.ndarray]:
    """Results under the names that `parity.compare` takes."""
    return {f"forward/{call.label}, output {i}": x for i, x in enumerate(outputs)} | {
        f"backward/{call.label}, input {i}": x for i, x in enumerate(gradients)
    }


def sizes_of(x: np.ndarray) -> tuple[float, float]:
    """Frobenius norm and largest element."""
    wide = np.abs(x.astype(np.float64))
    return float(np.linalg.norm(wide)), float(wide.max())


def linear_gap(operator: str, case: Known, outputs: Arrays, gradients: Arrays) -> float:
    """`<A x, y> - <x, A^T y>` over the norms of A x and y."""
    x, y, Ax, ATy = (z.astype(np.float64).ravel() for z in (case.call.arrays[0], case.call.cotangent, outputs[0], gradients[0]))
    return abs(float(Ax @ y - x @ ATy)) / float(np.linalg.norm(Ax) * np.linalg.norm(y))


def derivative_gap(operator: str, case: Known, outputs: Arrays, gradients: Arrays) -> float:
    """The gradients along random directions against central differences, over the norm of the gradient."""
    rng, worst = np.random.default_rng(5), 0.0
    for i, gradient in enumerate(gradients):
        g = gradient.astype(np.float64)
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(g.shape)
            plus, minus = (value_along(operator, case.call, i, sign * STEP * direction) for sign in (1, -1))
            gap = abs((plus - minus) / (2 * STEP) - float((g * direction).sum()))
            norm = float(np.linalg.norm(g))
            worst = max(worst, gap / norm if norm else np.inf)
    return worst


def value_along(operator: str, call: Call, number: int, step: np.ndarray) -> float:
    """The output times its gradient, in float64, with a step added to one of the arrays."""
    arrays = list(call.arrays)
    arrays[number] = arrays[number].astype(np.float64) + step
    (out, *_), _ = exact(operator, replace(call, arrays=arrays))
    return float((out * call.cotangent.astype(np.float64)).sum())


def changed(call: Call, keys_BS: np.ndarray, dtype: str) -> Call:
    """The call with other keys and values where `keys_BS` is true."""
    rng, (q, *rest) = np.random.default_rng(6), call.arrays
    made = []
    for x in rest:
        other = x.astype(np.float64) + LARGE * rng.standard_normal(x.shape)
        made.append(np.where(keys_BS[:, None, :, None], other, x.astype(np.float64)).astype(x.dtype))
    return replace(call, arrays=[q, *made])


def power_of_4(units: float) -> str:
    if not np.isfinite(units):
        return str(units)
    return str(4 ** max(int(np.ceil(np.log(max(units, 1)) / np.log(4))), 0))
