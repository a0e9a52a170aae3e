"""A child process of the selftest: the checks of one framework, one implementation after another.

It writes a JSON object a line to the file `--out`: `units`, the names of what there is to do; `start`, the number of the unit
that begins; `row`; `end`. `refused` says why nothing can be done on this device. The parent (selftest.children) reads them as
they come, so what is known survives the process.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from granvit.kernels import OPERATORS
from selftest import operators, timing, training
from selftest.calls import Side
from selftest.facts import version_rows
from selftest.operators import Check
from selftest.rows import NOTED, Row, failure

Unit = tuple[str, Callable[[], Iterator[Check]]]


def open_side(framework: str, device: str) -> Side:
    """The framework on a device. `ValueError` if the device is not there."""
    if framework == "torch":
        from selftest.side_torch import Torch

        return Torch(device)
    from selftest.side_mindspore import MindSpore

    return MindSpore(device)


def units(side: Side) -> list[Unit]:
    """What there is to do, in order, by name. The first of them cost nothing and say what the machine is."""
    made: list[Unit] = [("versions", partial(versions, side))]
    made += [(f"{row.operator} {row.name}", partial(operators.checks, side, row)) for row in operators.table_rows(side)]
    made += [("speed", partial(timing.device_speeds, side))]
    made += [(f"time {operator}", partial(timing.checks, side, operator)) for operator in OPERATORS]
    made += [(f"training {' '.join(names)}", partial(training.checks, side, names)) for names in training.groups()]
    return made


def versions(side: Side) -> Iterator[Check]:
    facts = {**side.facts(), "computes in": ", ".join(side.dtypes)}
    for name, value in facts.items():
        yield Check("version", name, partial(Row, "version", name, NOTED, note=value))
    for row in version_rows(side.device):
        yield Check("version", row.what, lambda row=row: row)


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a unit's name contains one of these texts; without any, every unit is wanted."""
    return not only or any(text in name for text in only)


def run_unit(make: Callable[[], Iterator[Check]], say: Callable[..., None]) -> bool:
    """Says the row of each check; an exception is a failed row, and the checks after it go on. Whether all ran to their end."""
    whole = True
    for check in make():
        try:
            row = check.run()
        except Exception as error:  # of whatever kind: the row says it
            row, whole = failure(check.check, check.what, error), False
        say(row=row.json())
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A child process of scripts/selftest_device.py, which starts it.")
    parser.add_argument("--framework", choices=("mindspore", "torch"), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--first", type=int, required=True, help="the number of the unit to begin with")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    with options.out.open("a", buffering=1) as file:

        def say(**event: Any) -> None:
            print(json.dumps(event), file=file, flush=True)

        try:
            side = open_side(options.framework, options.device)
        except ValueError as error:
            say(refused=str(error))
            return 0
        todo = [(name, make) for name, make in units(side) if wanted(name, options.only)]
        say(units=[name for name, _ in todo], device=side.device, devices=side.devices)
        for number, (_, make) in enumerate(todo[options.first :], options.first):
            say(start=number)
            # After an error an accelerator may answer everything with that error: the rest runs in another process.
            if not run_unit(make, say) and side.device != "cpu":
                break
        say(end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
