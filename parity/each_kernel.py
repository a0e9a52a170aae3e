"""Every implementation of every operator, switched on in turn: which there are on this machine, and what was computed already."""
from collections.abc import Iterator
from dataclasses import replace

from granvit.kernels import OPERATORS, Kernels
from granvit.launch import load_engine_class
from parity.capture import Record, Request, compute, configured, kernel_table, settings
from parity.fixture import Fixture
from parity.operators import cases

FRAMEWORKS = ("mindspore", "torch")


def kernels_of(framework: str, fixture: Fixture, request: Request) -> Kernels:
    """The choice that a model of the request makes in this framework."""
    package = load_engine_class(framework).__module__.partition(".")[0]
    named = configured(fixture, framework, "stage1", request).runtime.kernels
    return Kernels(package, kernel_table(framework), request.device, request.compute, named)


def picks(framework: str, fixture: Fixture, request: Request) -> dict[str, str]:
    """Operator -> implementation that a model of the request runs in this framework."""
    kernels, sizes = kernels_of(framework, fixture, request), {case.kernel: case.sizes for case in cases(fixture)}
    return {operator: kernels.row(operator, **sizes.get(operator, {})).name for operator in OPERATORS}


def implementations(fixture: Fixture, request: Request) -> Iterator[tuple[str, str]]:
    """Operator and name of everything that runs here in either framework, for the operators that have a choice."""
    sizes = {case.kernel: case.sizes for case in cases(fixture)}
    choices = [kernels_of(framework, fixture, request) for framework in FRAMEWORKS]
    for operator in OPERATORS:
        names = dict.fromkeys(name for kernels in choices for name in kernels.runnable(operator, **sizes.get(operator, {})))
        yield from ((operator, name) for name in names if len(names) > 1)


class Runs:
    """Computes records, as `parity.capture.compute`. What was computed with the same implementations before is not computed
    again: a framework that does not have the implementation that is switched on runs what it ran before."""

    def __init__(self) -> None:
        self.records: dict[tuple, Record] = {}

    def compute(self, fixture: Fixture, framework: str, request: Request) -> Record:
        ran = tuple(picks(framework, fixture, request).items())
        request_without_arrays = replace(request, golden=None, kernels=())
        key = (framework, fixture.seed, fixture.vision_name, fixture.language_name, request_without_arrays, ran)
        if key not in self.records:
            self.records[key] = compute(fixture, framework, request)
        found = self.records[key]
        return replace(found, settings=settings(fixture, request), suites=dict(found.suites))
