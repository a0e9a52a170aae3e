"""Mutation testing of parity: changes ms_granvit in one place at a time and runs the checks that could notice the change.
`python tests/mutate.py --help`. A command, not a test: a sample of 100 takes half an hour or more.

PyTorch's records are computed once. Each check of a mutant runs over a copy of the tree in a process that is forked from one that
has only imported MindSpore. The checks start with the likeliest one and stop at the first tensor that diverges. The results file
is written after every mutant. A later run with the same file keeps its results; mutants that were not noticed are run through the
checks that they have not had yet.
"""
import argparse
import ast
import copy
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ms_granvit"
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.yaml"
STEPS = 3  # of a trajectory
TIMEOUT = 600  # seconds that one check of one mutant may take

# The checks with the default fixture, and the suites that each runs. `forward` is the forward pass of the model in PyNative mode;
# the suites `model` and `model, PyNative` of parity/check.py notice everything that it notices.
DEFAULT = {
    "forward": (),
    "model": ("vision", "language", "model"),
    "step": ("stage1", "trajectory"),
    "stage2": ("stage2",),
    "generate": ("generate",),
    "ops": ("ops",),
    "ranks": ("trajectory2",),
}
# The mathematical files, and the checks that could notice a change in each, the likeliest first.
FILES = {
    "vision.py": ("forward", "ops", "step", "model"),
    "language.py": ("forward", "generate", "ops", "stage2", "step"),
    "layers.py": ("forward", "ops", "step", "model"),
    "projector.py": ("forward", "ops", "stage2"),
    "model.py": ("forward", "generate", "stage2", "step"),
    "distill.py": ("forward", "step", "model"),
    "objective.py": ("forward", "stage2"),
    "optimizer.py": ("step", "stage2"),
    "engine.py": ("forward", "step", "stage2", "generate"),
    "generate.py": ("generate",),
    "distributed.py": ("step", "ranks"),
    "ops/attention.py": ("forward", "ops", "generate", "stage2"),
    "ops/roi_align.py": ("ops", "forward", "step"),
}
UNIT_TESTS = {"distributed.py": ("tests/ms/test_distributed.py",)}  # for code that parity's small tensors do not reach
# Functions that are not mutated: they load, save, choose, report or close, or need an Ascend device.
LEFT_OUT = {
    "from_pretrained", "save_pretrained", "memory", "choose", "choose_device", "use_device", "join", "leave",
    "_more_than_one_core", "close", "compilations", "flash", "tensors", "load", "_group",
}  # fmt: skip

BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
          ast.Mod: ast.FloorDiv}  # fmt: skip
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
PAIRS = (
    "layer_norm1 layer_norm2", "input_layernorm post_attention_layernorm", "layer_scale1 layer_scale2", "q_proj k_proj",
    "k_proj v_proj", "gate_proj fc1", "gate_proj up_proj", "fc1 fc2", "linear_1 linear_2", "heads kv_heads", "keys values", "k v",
    "q k", "cos sin", "first_moment second_moment", "beta1 beta2", "teacher student", "low_BK high_BK", "low high",
    "rows columns", "H W", "mean std", "level built_level", "maximum minimum", "logical_and logical_or", "floor_divide floor_mod",
    "sum mean",
    "nt nn", "tn nn", "alpha one_minus_alpha", "rows_BT columns_BT", "tokens boxes", "caption distill", "distill variance",
    "ones zeros",
)  # fmt: skip
FUNCTIONS = ("maximum", "minimum", "logical_and", "logical_or", "floor_divide", "floor_mod", "sum", "mean", "ones", "zeros",
             "cos", "sin")  # fmt: skip
SWAPPED: dict[str, str] = {}
for _pair in PAIRS:
    for _a, _b in (_pair.split(), reversed(_pair.split())):
        SWAPPED.setdefault(_a, _b)
# Calls that a mutation may replace by their first argument.
IDENTITY = ("square", "sqrt", "rsqrt", "relu", "abs", "stop_gradient", "transpose", "log_softmax", "softmax", "sigmoid",
            "floor_divide", "floor_mod", "emit", "minimum", "maximum", "clamp")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change. Its `key` is made of file, function and text, so that it stays the same if line numbers change."""

    file: str
    line: int
    function: str
    change: str
    number: int  # among the changes of this function with the same text
    position: int  # among all changes of the file

    @property
    def key(self) -> str:
        return f"{self.file} {self.function}: {self.change}" + (f" ({self.number})" if self.number else "")


def mutants(file: str, source: str) -> list[Mutant]:
    """Every change of one file, in the order of the code."""
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    for position, (_, function, node, description) in enumerate(_walk(source)):
        key = f"{function}: {description}"
        seen[key] = seen.get(key, -1) + 1
        found.append(Mutant(file, node.lineno, function, description, seen[key], position))
    return found


def changed(source: str, mutant: Mutant) -> str:
    """The source of the file with this one change."""
    tree = next(itertools.islice(_walk(source), mutant.position, None))[0]
    return ast.unparse(ast.fix_missing_locations(tree))


def _walk(source: str) -> Iterator[tuple[ast.Module, str, ast.AST, str]]:
    """Makes one change after another in the tree, each undone before the next; yields tree, function, node and description."""
    tree = ast.parse(source)
    words = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | set(FUNCTIONS)
    for function, statement, names, owner, place in _statements(tree, ""):
        for node, description, restore in _changes(statement, names, words, owner, place):
            yield tree, function, node, description
            restore()


def _statements(node: ast.AST, path: str) -> Iterator[tuple[str, ast.stmt, set[str], list, int]]:
    """The statements inside functions: path of the function, statement, names used in the function, the list that holds the
    statement, and its index there."""
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name not in LEFT_OUT:
            yield from _statements(child, f"{path}.{child.name}".lstrip("."))
    if not isinstance(node, ast.FunctionDef):
        return
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    yield from ((path, statement, names, owner, place) for statement, owner, place in _simple(node.body))


def _simple(body: list) -> Iterator[tuple[ast.stmt, list, int]]:
    for place, statement in enumerate(body):
        if isinstance(statement, (ast.Assert, ast.Raise, ast.Global, ast.FunctionDef, ast.Pass)):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.If) and all(isinstance(s, ast.Raise) for s in statement.body):
            continue  # a check of arguments
        yield statement, body, place
        for inner in ("body", "orelse", "finalbody"):
            yield from _simple(getattr(statement, inner, []))


def _changes(statement: ast.stmt, names: set[str], attributes: set[str], owner: list,
             place: int) -> Iterator[tuple[ast.AST, str, Any]]:  # fmt: skip
    """Makes one change after another in the statement; the caller must undo each (third item) before it asks for the next."""
    text = ast.unparse(statement)
    if _droppable(statement):
        owner[place] = ast.copy_location(ast.Pass(), statement)
        yield statement, f"`{_short(text)}` dropped", lambda: owner.__setitem__(place, statement)
    for parent, field, index, node in _expressions(statement):
        for replacement in _replacements(node, names, attributes):
            before = ast.unparse(node)
            after = ast.unparse(ast.fix_missing_locations(ast.copy_location(replacement, node)))
            if after == before:
                continue
            _put(parent, field, index, replacement)
            yield node, f"`{_short(before)}` -> `{_short(after)}`", partial(_put, parent, field, index, node)


def _droppable(statement: ast.stmt) -> bool:
    """Whether a statement can be dropped: a call without a result, or an assignment that computes a name from its old value."""
    if isinstance(statement, ast.Expr):
        called = statement.value.func if isinstance(statement.value, ast.Call) else None
        return not (isinstance(called, ast.Attribute) and called.attr == "__init__")
    if isinstance(statement, ast.AugAssign):
        return True
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
        return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(statement.value))
    return False


def _expressions(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.expr]]:
    """The expressions of one statement, without those of nested statements, annotations and assignment targets."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "targets", "target", "body", "orelse", "returns", "ctx") and isinstance(node, ast.stmt):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.expr):
                yield node, field, index, child
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt):
                yield from _expressions(child)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _replacements(node: ast.expr, names: set[str], attributes: set[str]) -> Iterator[ast.expr]:
    """Replacements of one expression. A name is replaced only by another name of the same function, because an unknown name
    raises an error that every check would notice."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in BINARY:
            yield ast.BinOp(node.left, BINARY[type(node.op)](), node.right)
        yield node.left
        if isinstance(node.op, (ast.Add, ast.Mult)):
            yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _constants(node.value))
    elif isinstance(node, ast.Slice):
        if node.lower is not None and node.upper is None:
            yield ast.Slice(None, node.lower, node.step)
        elif node.upper is not None and node.lower is None:
            yield ast.Slice(node.upper, None, node.step)
    elif isinstance(node, ast.Attribute) and SWAPPED.get(node.attr) in attributes and isinstance(node.ctx, ast.Load):
        yield ast.Attribute(node.value, SWAPPED[node.attr], node.ctx)
    elif isinstance(node, ast.Name) and SWAPPED.get(node.id) in names and isinstance(node.ctx, ast.Load):
        yield ast.Name(SWAPPED[node.id], node.ctx)
    elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and not any(isinstance(e, ast.Constant) for e in node.elts):
        yield ast.Tuple(node.elts[::-1], node.ctx)
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in IDENTITY:
            of_module = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("ops", "self")
            yield node.args[0] if of_module else node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
        for i in range(len(node.args) - 1):
            kinds = [isinstance(a, (ast.Constant, ast.Tuple)) for a in node.args[i : i + 2]]
            if name != "cast" and kinds[0] == kinds[1] and not any(isinstance(a, ast.Starred) for a in node.args):
                swapped = copy.copy(node.args)
                swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
                yield ast.Call(node.func, swapped, node.keywords)


def _constants(value: Any) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [{0: 1, 1: 0}.get(value, value + 1)]
    if isinstance(value, float):
        return [{0.0: 1.0, 1.0: 0.5}.get(value, value * (1000 if abs(value) < 1e-3 else 1.1))]
    return []


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-25:]}"


def all_mutants(package: Path) -> list[Mutant]:
    """The mutants of all mathematical files."""
    return [mutant for file in FILES for mutant in mutants(file, (package / file).read_text())]


def checks(file: str, options: bool) -> list[str]:
    """The checks that could notice a change of this file, in the order in which they run."""
    found = [*FILES[file], *UNIT_TESTS.get(file, ())]
    if options:
        from parity.options import OPTIONS, option_suite

        in_graph = [f"{option_suite(name)}, step" for name in OPTIONS]
        found += in_graph if file == "optimizer.py" else [*map(option_suite, OPTIONS), *in_graph]
    return found


# --- one check ---------------------------------------------------------------------------------------------------------
def reference(directory: Path) -> None:
    """Writes PyTorch's records for all checks: the golden one in float64, and the peer in float32."""
    from granvit.launch import load_engine_class
    from parity.capture import Request, compute
    from parity.fixture import make_fixture

    load_engine_class("torch")
    suites = (*(suite for group in DEFAULT.values() for suite in group), "options")
    for name, precision in (("golden", "float64"), ("peer", "float32")):
        record = compute(make_fixture(0), "torch", Request(suites, STEPS, precision))
        record.suites["forward"] = {k: v for k, v in record.suites["model"].items() if k.startswith(("forward/", "loss/"))}
        record.save(directory / name)


def computed(check: str) -> dict[str, dict[str, np.ndarray]]:
    """MindSpore's tensors for one check, by suite."""
    from parity.capture import Request, compute, forward_pass, option_steps
    from parity.fixture import make_fixture
    from parity.options import OPTIONS, option_fixture

    request = Request(DEFAULT.get(check, ()), STEPS)
    if check == "forward":
        return {check: forward_pass("mindspore", make_fixture(0), "stage1", request)}
    if check in DEFAULT:
        return compute(make_fixture(0), "mindspore", request).suites
    name, _, step = check.removeprefix("option ").partition(", ")
    fixture, stage = option_fixture(0, name), OPTIONS[name].stage
    if step:
        return dict(option_steps("mindspore", fixture, stage, request))
    return {check: forward_pass("mindspore", fixture, stage, request)}


def run_check(tree: Path, records: dict[str, Any], check: str) -> dict[str, str]:
    """Runs one check of the package in `tree`. Returns how a difference was noticed (empty: it was not), and where."""
    from parity.compare import compare_suite

    if check.endswith(".py"):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", check]
        done = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True)
        return {"how": "failed" if done.returncode else "", "where": ""}
    for suite, tensors in computed(check).items():
        candidate = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # no scalars, as in a record on disk
        sides = (records[side].suites[suite] for side in ("golden", "peer"))
        first = next((row for row in compare_suite(suite, *sides, candidate, "float32") if not row.passed), None)
        if first is not None:
            return {"how": "diverged", "where": f"{suite}: {first.kind}/{first.name}"}
    return {"how": "", "where": ""}


def in_fork(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Runs `work` in a forked process and returns its result, or that it raised an error, ended or timed out."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            found = work()
        except Exception as error:
            found = {"how": "raised", "where": _short(f"{type(error).__name__}: {error}")}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        ready, _, _ = select.select([answer], [], [], TIMEOUT)
        text = answer.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready:
        return {"how": "timed out", "where": ""}
    return json.loads(text) if text else {"how": "raised", "where": f"the process ended with status {status}"}


# --- the whole ---------------------------------------------------------------------------------------------------------
def copy_tree(folder: Path) -> Path:
    """Copies the files that the checks need."""
    tree = folder / "tree"
    for name in ("granvit", "ms_granvit", "pt_granvit", "parity", "configs", "tests", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def try_mutant(mutant: Mutant, known: dict[str, Any], tree: Path, records: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Runs the checks that this mutant has not had yet, until one notices it."""
    began, target = time.monotonic(), tree / PACKAGE / mutant.file
    original = target.read_text()
    known = {"line": mutant.line, "by": "", "how": "", "where": "", "ran": [], "seconds": 0.0} | known
    try:
        target.write_text(changed(original, mutant))
        for check in (c for c in wanted if c not in known["ran"]):
            known |= in_fork(partial(run_check, tree, records, check)) | {"ran": [*known["ran"], check]}
            if known["how"]:
                known["by"] = check
                break
    finally:
        target.write_text(original)
    return known | {"seconds": round(known["seconds"] + time.monotonic() - began, 1)}


def equivalents() -> dict[str, str]:
    """The mutants that were found by hand to compute the same, with the reason."""
    return yaml.safe_load(EQUIVALENT.read_text())


def summary(results: dict[str, Any]) -> str:
    """A text with the shares of mutants that were noticed, and a line for each that was not."""
    same = equivalents()
    judged = {key: found for key, found in results.items() if key not in same}
    lines = [f"{len(results)} mutants, {len(results) - len(judged)} of them equivalent programs; of {len(judged)}:"]
    by_default = [f for f in judged.values() if f["by"] in DEFAULT]
    for text, found in (("the default fixture", by_default), ("all checks", [f for f in judged.values() if f["how"]])):
        raised = sum(f["how"] == "raised" for f in found)
        lines.append(f"noticed by {text}: {len(found)} ({len(found) / max(len(judged), 1):.1%}), {raised} of them by an error")
    lines += [f"  equivalent: {key}: {same[key]}" for key in results if key in same]
    lines += [f"  noticed though called equivalent: {k} (by {f['by']})" for k, f in results.items() if k in same and f["how"]]
    lines += [f"  by {f['by']} alone: {key}" for key, f in judged.items() if f["how"] and f["by"] not in DEFAULT]
    lines += [f"  NOT NOTICED: {key} (line {f['line']})" for key, f in judged.items() if not f["how"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants in the sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.json"), help="file of the results (default: %(default)s)")
    parser.add_argument("--file", choices=tuple(FILES), help="only the sample's mutants of this file")
    parser.add_argument("--no-options", action="store_true", help="only the checks with the default fixture")
    parser.add_argument("--minutes", type=float, help="start no further mutant after this time")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the results in the file and run nothing")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    results: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    sample = random.Random(o.seed).sample(all_mutants(ROOT / PACKAGE), o.count)
    sample = [mutant for mutant in sample if o.file in (None, mutant.file)]
    if o.reference:
        reference(o.reference)
    elif o.summary:
        print(summary(results))
    elif o.list:
        print("\n".join(f"{mutant.key} (line {mutant.line})" for mutant in sample))
    else:
        with tempfile.TemporaryDirectory(prefix="granvit-mutants-") as folder:
            return run(o, sample, results, Path(folder))
    return 0


def run(o: argparse.Namespace, sample: list[Mutant], results: dict[str, Any], folder: Path) -> int:
    """Tries every mutant of the sample and prints the results. Returns 2 if the unchanged package fails a check."""
    out, tree = o.out.resolve(), copy_tree(folder)
    binaries = Path(sys.executable).parent  # with msrun
    os.environ |= {"PYTHONPATH": str(tree), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    os.chdir(tree)  # MindSpore writes files about graphs that it cannot compile
    subprocess.run([sys.executable, "tests/mutate.py", "--reference", str(folder / "records")], check=True)
    sys.path.insert(0, str(tree))
    import mindspore  # noqa: F401  # once, before the forks

    from parity.capture import load_record

    records = {side: load_record(folder / "records" / side) for side in ("golden", "peer")}
    wanted = {file: checks(file, not o.no_options) for file in FILES}
    began = time.monotonic()
    for check in dict.fromkeys(check for file in {mutant.file for mutant in sample} for check in wanted[file]):
        found = in_fork(partial(run_check, tree, records, check))
        print(f"unchanged, {check}: {found['how'] or 'equal'} {found['where']}", flush=True)
        if found["how"]:
            return 2
    for number, mutant in enumerate(sample):
        known = results.get(mutant.key, {})
        if known.get("how") or set(wanted[mutant.file]) <= set(known.get("ran", ())):
            continue
        if o.minutes and time.monotonic() - began > 60 * o.minutes:
            print(f"stopped after {o.minutes:g} minutes, before mutant {number + 1}")
            break
        found = results[mutant.key] = try_mutant(mutant, known, tree, records, wanted[mutant.file])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))
        said = f"{found['how']} ({found['by']}, {found['where']})" if found["how"] else "NOT NOTICED"
        print(f"{number + 1}/{len(sample)} {mutant.key}: {said}, {found['seconds']:.0f} s", flush=True)
    print(summary({mutant.key: results[mutant.key] for mutant in sample if mutant.key in results}))
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of tests/, which also has a package `parity`
    sys.exit(main())
