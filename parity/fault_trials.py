"""Tests of the check itself: runs with a planted fault, and runs of other seeds without one."""
import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console

from granvit.kernels import COMPOSED, OPERATORS
from parity.capture import Request, configured, make_engine, open_model, opened_suite, reset, training_step
from parity.compare import Row, compare_records, compare_suite
from parity.each_kernel import Runs
from parity.faults import Fault
from parity.fixture import make_fixture
from parity.options import OPTIONS, option_suite
from parity.report import describe

TRIAL_STEPS = 3  # of a trajectory
SEED_SUITES = ("vision", "language", "model")


class Trial:
    """Runs planted faults. Fixtures and records without a fault are computed once and reused."""

    def __init__(self, options: argparse.Namespace, runs: Runs):
        self.options, self.runs = options, runs
        self.fixture = cache(lambda vision: make_fixture(options.seed, vision, options.language))

    def fault(self, fault: Fault) -> dict[str, Any]:
        """Plants the fault and judges its suite. A fault in PyTorch is planted in the golden reference too, because both are
        computed by the same package."""
        suite = fault.suite
        outcome = {
            "name": fault.name,
            "framework": {"torch": "PyTorch", "mindspore": "MindSpore"}[fault.framework],
            "suite": suite,
            "expected": " or ".join(fault.where),
        }
        try:
            rows = self._rows(fault)
        except Exception as error:  # one fault that cannot be planted must not hide the others
            reason = f"could not be run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return {**outcome, "first": reason, "detected": False, "located": False}
        first = next((row for row in rows if not row.passed), None)
        located = first is not None and f"{first.kind}/{first.name}".startswith(fault.where)
        named = "nothing" if first is None else describe(first, "")
        return {**outcome, "first": named, "detected": first is not None, "located": located}

    def _rows(self, fault: Fault) -> list[Row]:
        suite, precision, fixture = fault.suite, self.options.precision, self.fixture(fault.vision)
        clean = request_of(suite, precision, kernels_beside(fault, self.options.kernels))
        planted = replace(clean, fault=fault.name)
        in_torch, in_mindspore = (planted, clean) if fault.framework == "torch" else (clean, planted)
        golden = self.runs.compute(fixture, "torch", replace(in_torch, compute="float64"))
        peer = self.runs.compute(fixture, "torch", in_torch)
        candidate = self.runs.compute(fixture, "mindspore", in_mindspore)
        rows = compare_records(golden, peer, candidate)
        return [row for row in rows if row.suite == suite or suite == "ops"]  # `ops` has the suites of other kernels beside it


def kernels_beside(fault: Fault, named: Mapping[str, str]) -> dict[str, str]:
    """The implementations with which a fault is tried: `composed`, but for `named`, unless the fault is in the composed one."""
    return dict.fromkeys(OPERATORS, COMPOSED) | {op: name for op, name in named.items() if op != fault.operator}


def request_of(suite: str, precision: str, kernels: Mapping[str, str]) -> Request:
    """The request that computes one suite; for a suite of an option, only that configuration."""
    option = next((name for name in OPTIONS if suite.startswith(option_suite(name))), None)
    if option is None:
        return Request((suite,), TRIAL_STEPS, precision, kernels=kernels)
    return Request(("options",), TRIAL_STEPS, precision, options=(option,), kernels=kernels)


def false_alarms(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Judges fixtures of `--seeds` other seeds: encoder, decoder, model and a training step. Each graph is compiled once."""
    sides: dict[str, tuple[Any, Any]] = {}
    first = make_fixture(options.seed, options.vision, options.language)
    wanted = (("golden", "torch", "float64"), ("peer", "torch", options.precision), ("candidate", "mindspore", options.precision))
    for side, framework, precision in wanted:
        request = Request((), 1, precision, kernels=options.kernels)
        config = configured(first, framework, "stage1", request)
        sides[side] = open_model(framework, first, config, first.shapes(config)), make_engine(framework, first, config)
    alarms, worst = [], 0.0
    for number in range(options.seeds):
        fixture = make_fixture(options.seed + 1 + number, options.vision, options.language)
        for suite in (*SEED_SUITES, "stage1"):
            found = {}
            for side, (opened, engine) in sides.items():
                if suite == "stage1":
                    reset(engine, fixture)
                    found[side] = training_step(engine, fixture)
                else:
                    reset(opened.engine, fixture)
                    found[side] = opened_suite(opened, fixture, suite)
            for row in compare_suite(suite, found["golden"], found["peer"], found["candidate"], options.precision):
                worst = max(worst, row.badness)
                if not row.passed:
                    alarms.append(f"seed {fixture.seed}, {suite}: {describe(row, '')}")
        if (number + 1) % 10 == 0:
            console.print(f"[dim]{number + 1}/{options.seeds} seeds, worst error {worst:.2f} of its limit[/]", highlight=False)
    return {"seeds": options.seeds, "alarms": alarms, "worst": worst}
