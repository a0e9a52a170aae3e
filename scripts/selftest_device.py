"""Checks GranViT on this machine's device, for whoever has a 910B, a GPU or only a CPU: versions, every implementation of every
operator against float64, adjoint tests, head width 72 against 80, masks, classes of error in 16 bit, times against the device's
measured matrix product, a training step of each stage on a tiny model, two ranks.

It prints a table and writes a JSON file to send back. Every part runs in a process of its own: what crashes or hangs is a failed
row, and the rest goes on.

Exit status: 0 every check passed, 1 one failed, 2 wrong usage or nothing that could be checked.
"""
import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the command works without installation

from selftest.child import wanted
from selftest.children import run_framework
from selftest.facts import machine_rows
from selftest.ranks import two_ranks
from selftest.rows import ABSENT, FAILED, Row, summary, table
from selftest.training import TRAINING, against_cpu

from granvit.launch import Framework

SCHEMA = 1
INSTALLED: tuple[Framework, ...] = ("mindspore", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    frameworks = [name for name in INSTALLED if options.framework in (name, "both")]
    if options.framework is None:
        frameworks = [name for name in INSTALLED if find_spec(name)]
    absent = [name for name in frameworks if not find_spec(name)]
    if absent or not frameworks:
        return refuse(f"{' and '.join(absent or INSTALLED)} not installed for {sys.executable}: pip install -e '.[torch]' "
                      "or '.[mindspore]'")  # fmt: skip
    began, rows, refused = time.monotonic(), machine_rows(), []
    known = len(rows)
    for framework in frameworks:
        print(f"{framework}:", file=sys.stderr, flush=True)
        found = check(framework, options.device, options.only)
        refused += [found[0].note] if len(found) == 1 and found[0].result == ABSENT else []
        rows += found
    if len(refused) == len(frameworks):
        return refuse("; ".join(refused))
    if len(rows) == known:
        return refuse(f"--only {' '.join(options.only)}: no check has such a name")
    seconds = time.monotonic() - began
    failed = [row for row in rows if row.result == FAILED]
    print(table(rows))
    print(f"\n{summary(rows)}; {seconds:.0f} s; {options.json}")
    write(options.json, rows, sys.argv[1:] if arguments is None else arguments, seconds, bool(failed))
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python scripts/selftest_device.py                            # what is installed, on the accelerator if there is one
  python scripts/selftest_device.py --framework torch --device cuda
  python scripts/selftest_device.py --only attention           # some checks: those whose name contains a text""",
    )  # fmt: skip
    parser.add_argument("--framework", choices=(*INSTALLED, "both"), help="default: what is installed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto",
                        help="auto is the accelerator if there is one (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT",
                        help="only these: versions, OPERATOR IMPLEMENTATION, speed, time OPERATOR, training STAGE, all-reduce; "
                        "part of a name is enough")  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("selftest.json"), metavar="FILE",
                        help="the file to send back (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: its directory does not exist")
    return options


def refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def check(framework: Framework, device: str, only: Sequence[str]) -> list[Row]:
    """The rows of a framework; one row if it does not run on the device."""
    found = run_framework(framework, device, only, report)
    if found.refused:
        return [Row("device", device, ABSENT, note=found.refused, framework=framework)]
    rows = found.rows
    if found.device not in ("", "cpu") and any(row.check == TRAINING for row in rows):
        print("the same steps on the CPU:", file=sys.stderr, flush=True)
        on_cpu = run_framework(framework, "cpu", [TRAINING], report)
        rows += against_cpu([row for row in rows if row.check == TRAINING], on_cpu.rows)
    if found.device and wanted("all-reduce", only):
        row = two_ranks(framework, found.device, found.devices)
        report(row)
        rows.append(row)
    return rows


def report(row: Row) -> None:
    """One line about a check that is done."""
    print(f"  {row.result:9}{row.check} {row.what}", file=sys.stderr, flush=True)


def write(path: Path, rows: Sequence[Row], arguments: Sequence[str], seconds: float, failed: bool) -> None:
    """The JSON file. Every row has all fields, so that nobody has to guess."""
    tree = {
        "schema": SCHEMA,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": list(arguments),
        "seconds": round(seconds, 1),
        "status": int(failed),
        "rows": [row.json() for row in rows],
    }
    path.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
