"""Computes the suites of a fixture in one framework as named tensors, and stores them on disk as a record.

A record is a directory: `record.json` (schema, settings with hashes, versions, order of the tensors) and `<suite>.safetensors`,
whose tensors are called `<kind>/<name>`. Kinds: `forward` and `backward` (an activation and its gradient), `gradient` (of a
parameter), `loss`, and those of a training step (moments, weights, ...). bfloat16 and float16 are stored as float32.

Run as a script, this file is one rank of the suite `trajectory2`; msrun or torchrun starts it.
"""
import argparse
import hashlib
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from granvit.config import RunConfig
from granvit.engine import LOSSES, Group, TrainEngine
from granvit.introspection import INPUTS, Capture, Feed, Introspection
from granvit.kernels import COMPOSED, OPERATORS, Named, Row
from granvit.launch import load_engine_class
from granvit.models import PARTS, Shapes, part_of
from parity import faults
from parity.fixture import MICRO_BATCHES, NEW_TOKENS, STOP, Fixture, make_fixture
from parity.operators import Case, cases
from parity.options import OPTIONS, option_fixture, option_suite
from parity.preconditions import check_deterministic

SCHEMA = 1
Tensors = dict[str, np.ndarray]  # "<kind>/<name>" -> values, in order of execution
KERNELS = "kernels"  # the suite of all implementations of the operators
DOCUMENTED = "documented"  # the suite of the implementations of an NPU, on stand-ins
BY = ", by "  # between the name of a tensor and the implementation that made it
OPENED = ("vision", "language", "model", "isolated")  # suites that share one model with taps
# The tensors of an engine after a training step, and what their kinds are called.
KINDS: dict[Group, str] = {"first_moment": "first moment", "second_moment": "second moment", "model": "weight",
                           "teacher": "teacher"}  # fmt: skip
# Suites of one part: the activation that seeded values replace, and the prefix of the part's tensors. `projector.linear_1` is the
# first activation after the encoder.
ALONE = {"vision": ("projector.linear_1", "vision."), "language": (INPUTS, "language")}
BEFORE_INPUTS = ("forward/language.model.embed_tokens", "backward/language.model.embed_tokens")


@dataclass
class Record:
    """What one framework computed. Two records can be compared only if their `settings` are equal."""

    framework: str
    device: str
    compute: str
    settings: dict[str, Any]
    environment: dict[str, str]
    suites: dict[str, Tensors] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Writes the record; `ValueError` if the directory already holds one."""
        manifest = directory / "record.json"
        if manifest.exists():
            raise ValueError(f"{manifest} exists: a record is never overwritten; name another directory")
        directory.mkdir(parents=True, exist_ok=True)
        for suite, tensors in self.suites.items():
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / f"{suite}.safetensors")
        head = {k: v for k, v in asdict(self).items() if k != "suites"}
        order = {suite: list(tensors) for suite, tensors in self.suites.items()}
        manifest.write_text(json.dumps({"schema": SCHEMA, **head, "order": order}, indent=1))


def load_record(directory: Path) -> Record:
    """Reads a record; `ValueError` if there is none, if its schema is another, or if it is damaged."""
    manifest = directory / "record.json"
    try:
        tree = json.loads(manifest.read_text())
    except FileNotFoundError:
        raise ValueError(f"{manifest}: no such file; `python parity/check.py --record {directory}` writes a record") from None
    except ValueError as error:
        raise ValueError(f"{manifest}: not JSON: {error}") from None
    if tree.get("schema") != SCHEMA:
        raise ValueError(f"{manifest} has schema {tree.get('schema')!r}; this version reads {SCHEMA}. Record it again")
    order = tree.pop("order")
    record = Record(**{k: v for k, v in tree.items() if k != "schema"})
    for suite, names in order.items():
        path = directory / f"{suite}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; record it again") from None
        if set(tensors) != set(names):
            raise ValueError(f"{path} does not hold the tensors that {manifest} lists; record it again")
        record.suites[suite] = {name: tensors[name] for name in names}
    return record


@dataclass(frozen=True)
class Request:
    """What to compute. With `graph` False MindSpore runs in PyNative mode. `golden` holds the inputs of the suite `isolated`, and
    `options` the names of the configurations that the suite `options` runs."""

    suites: tuple[str, ...]
    steps: int
    compute: str = "float32"
    device: str = "cpu"
    graph: bool = True
    fault: str | None = None
    golden: Tensors | None = None
    options: tuple[str, ...] = tuple(OPTIONS)
    kernels: Mapping[str, str] = field(default_factory=dict)  # operator -> implementation, see `configured`


def compute(fixture: Fixture, framework: str, request: Request) -> Record:
    """Runs the suites of `request` in one framework."""
    load_engine_class(framework)  # ValueError if the framework is not installed
    record = Record(framework, request.device, request.compute, settings(fixture, request), environment(framework))
    with faults.planted(request.fault, framework):
        for suite, tensors in _suites(fixture, framework, request):
            record.suites[suite] = {name: _storable(array) for name, array in tensors.items()}
    return record


def open_model(framework: str, fixture: Fixture, config: RunConfig, shapes: Shapes, graph: bool = True) -> Introspection:
    """The fixture's start model with taps at the activations in `shapes`; `ValueError` if the framework is not installed."""
    package = load_engine_class(framework).__module__.partition(".")[0]
    introspect = importlib.import_module(f"{package}.introspect")
    if shapes:  # logits are an activation, and `composed` alone makes all of them
        config = with_kernels(config, {"cross_entropy": COMPOSED})
    return introspect.Introspector(config, fixture.vision, fixture.language, fixture.weights.items(), shapes, graph)


def configured(fixture: Fixture, framework: str, stage: str, request: Request) -> RunConfig:
    """The fixture's run of one stage in one framework. Operators in `request.kernels` run the implementation named there, or
    `composed` where the framework does not have it; in float64, the golden reference, every operator is `composed`."""
    config = fixture.config(stage, request.compute, request.device)
    if request.compute == "float64":
        return with_kernels(config, dict.fromkeys(OPERATORS, COMPOSED))
    return with_kernels(config, {operator: [name, COMPOSED] for operator, name in request.kernels.items()})


def with_kernels(config: RunConfig, named: Named) -> RunConfig:
    """The run with these implementations besides those that it names already."""
    kernels = {**config.runtime.kernels, **named}
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"kernels": kernels})})


def kernel_table(framework: str) -> Sequence[Row]:
    """The implementations of a framework's operators."""
    package = load_engine_class(framework).__module__.partition(".")[0]
    return importlib.import_module(f"{package}.ops.table").TABLE


def make_engine(framework: str, fixture: Fixture, config: RunConfig) -> TrainEngine:
    """An engine with the fixture's start weights; `ValueError` if the framework is not installed."""
    return load_engine_class(framework)(config, fixture.vision, fixture.language, fixture.weights.items())


def settings(fixture: Fixture, request: Request) -> dict[str, Any]:
    """The settings that must be equal for two records to be comparable."""
    return {
        "seed": fixture.seed,
        "vision": fixture.vision.model_dump(mode="json"),
        "language": fixture.language.model_dump(mode="json"),
        "weights": fixture.weights_hash,
        "batches": fixture.batches_hash,
        "steps": request.steps,
        "kernels": dict(request.kernels),
        "options": _options_hash(fixture.seed, request.options) if "options" in request.suites else "",
    }


def _options_hash(seed: int, names: Iterable[str]) -> str:
    """SHA-256 over these configurations' models, start weights and batches."""
    made = [option_fixture(seed, name) for name in names]
    texts = [f"{f.vision} {f.language} {f.weights_hash} {f.batches_hash} {OPTIONS[f.vision_name]}" for f in made]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def environment(framework: str) -> dict[str, str]:
    """Versions, for the report."""
    package = {"torch": "torch", "mindspore": "mindspore"}[framework]
    return {
        package: metadata.version(package),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _storable(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array


def _suites(fixture: Fixture, framework: str, request: Request) -> Iterable[tuple[str, Tensors]]:
    suites = request.suites
    config = configured(fixture, framework, "stage1", request)
    if {"ops", "generate"} & set(suites):
        closed = open_model(framework, fixture, config, {}, request.graph)
        if "ops" in suites:
            yield "ops", _operators(closed, fixture)
            yield KERNELS, _other_kernels(closed, fixture)
            if request.device == "cpu" and request.compute == "float32":
                yield DOCUMENTED, _documented_kernels(closed, fixture, framework)
        if "generate" in suites:
            yield "generate", _generation(closed, fixture)
    if set(OPENED) & set(suites):
        opened = open_model(framework, fixture, config, fixture.shapes(config), request.graph)
        for suite in (s for s in OPENED if s in suites):
            found = opened_suite(opened, fixture, suite, request.golden)
            check_deterministic(framework, found, opened_suite(opened, fixture, suite, request.golden))
            yield suite, found
    for stage in ("stage1", "stage2"):
        if stage not in suites and not (stage == "stage1" and "trajectory" in suites):
            continue
        engine = make_engine(framework, fixture, configured(fixture, framework, stage, request))
        if stage in suites:
            yield stage, training_step(engine, fixture)
        if stage == "stage1" and "trajectory" in suites:
            reset(engine, fixture)
            yield "trajectory", _trajectory(engine, fixture, request.steps)
    if "trajectory2" in suites:
        yield "trajectory2", _two_ranks(fixture, framework, request)
    if "options" in suites:
        for name in request.options:
            yield from _option(fixture.seed, framework, request, name)


def _option(seed: int, framework: str, request: Request, name: str) -> Iterable[tuple[str, Tensors]]:
    """The suites of one configuration: a forward pass with every activation (MindSpore in PyNative mode), and training steps
    (MindSpore in its static graph). So only one large graph is compiled, and a difference can still be located."""
    fixture = option_fixture(seed, name)
    yield option_suite(name), forward_pass(framework, fixture, OPTIONS[name].stage, request)
    yield from option_steps(framework, fixture, OPTIONS[name].stage, request)


def option_steps(framework: str, fixture: Fixture, stage: str, request: Request) -> Iterable[tuple[str, Tensors]]:
    """A training step of one configuration, and one more over batches in which nothing is supervised and no box is valid."""
    suite = option_suite(fixture.vision_name)
    engine = make_engine(framework, fixture, configured(fixture, framework, stage, request))
    yield f"{suite}, step", training_step(engine, fixture)
    batches = [replace(batch, answer_weights_BA=0 * batch.answer_weights_BA, box_weights_BK=0 * batch.box_weights_BK)
               for batch in fixture.step_batches(2)]  # fmt: skip
    result = engine.step(batches, fixture.step_inputs(2, batches))
    found: Tensors = {f"loss/{name}": np.array(value) for name, value in vars(result).items()}
    yield f"{suite}, empty step", found | _state(engine, fixture, "model")


def forward_pass(framework: str, fixture: Fixture, stage: str, request: Request) -> Tensors:
    """Every activation and the losses of the first micro-batch. MindSpore runs in PyNative mode, so nothing is compiled."""
    config = configured(fixture, framework, stage, request)
    shapes = fixture.shapes(config)
    opened = open_model(framework, fixture, config, shapes, graph=False)
    return _flat(opened.capture(fixture.batches[0], backward=False), list(shapes))


def opened_suite(opened: Introspection, fixture: Fixture, suite: str, golden: Tensors | None = None) -> Tensors:
    """One suite of a model with taps: the encoder alone, the decoder alone, the whole model, or every module isolated."""
    shapes = fixture.shapes(opened.engine.config)
    feed: Feed = {}
    if suite in ALONE:
        border, path = ALONE[suite]
        feed = fixture.boundary(border, shapes[border])
    elif suite == "isolated":
        assert golden is not None, "the suite `isolated` needs the golden model's activations"
        # The teacher has no backward pass: any array can stand for its gradients.
        feed = {n: (golden[f"forward/{n}"], golden.get(f"backward/{n}", golden[f"forward/{n}"])) for n in shapes}
    found = _flat(opened.capture(fixture.batches[0], feed), list(shapes))
    if suite not in ALONE:
        return found
    return {key: array for key, array in found.items() if key.partition("/")[2].startswith(path) and key not in BEFORE_INPUTS}


def _flat(capture: Capture, order: list[str]) -> Tensors:
    """Activations in order of execution, losses, gradients of activations in reverse order, gradients of parameters."""
    found = {f"forward/{name}": capture.activations[name] for name in order}
    found |= {f"loss/{name}": np.array(capture.losses[name]) for name in reversed(LOSSES)}  # parts before their sum
    gradients = capture.activation_gradients
    found |= {f"backward/{name}": gradients[name] for name in reversed(order) if name in gradients}
    return found | {f"gradient/{name}": capture.parameter_gradients[name] for name in capture.parameter_gradients}


def _operators(closed: Introspection, fixture: Fixture) -> Tensors:
    found: Tensors = {}
    for case in cases(fixture):
        found |= _operator(closed, fixture, case)
    return found


def _other_kernels(closed: Introspection, fixture: Fixture) -> Tensors:
    """The operators again with every implementation that runs here; the names end in the implementation's."""
    found: Tensors = {}
    for case in cases(fixture):
        if case.kernel is None:
            continue
        names = closed.engine.kernels.runnable(case.kernel, **case.sizes)
        for name in names if len(names) > 1 else ():
            found |= {f"{key}{BY}{name}": array for key, array in _operator(closed, fixture, case, {case.kernel: name}).items()}
    return found


def _documented_kernels(closed: Introspection, fixture: Fixture, framework: str) -> Tensors:
    """The operators with the implementations of an NPU, in float16, on stand-ins that follow CANN's documents."""
    stand_ins = importlib.import_module(f"parity.documented.{'torch_npu' if framework == 'torch' else 'mindspore_ascend'}")
    rows = [row for row in kernel_table(framework) if "npu" in row.devices.split()]
    found: Tensors = {}
    with stand_ins.installed():
        for case in cases(fixture):
            for row in rows:
                if row.operator == case.kernel and not row.cannot(**case.sizes) and not row.missing():
                    made = _operator(closed, fixture, case, {row.operator: row.name}, documented=True)
                    found |= {f"{key}{BY}{row.name}": array for key, array in made.items()}
    return found


def _operator(closed: Introspection, fixture: Fixture, case: Case, named: Mapping[str, str] | None = None,
              documented: bool = False) -> Tensors:  # fmt: skip
    """The output of an operator and the gradients of its inputs."""
    cotangent = np.random.default_rng((fixture.seed, 22)).standard_normal(case.out, np.float32)
    out, gradients = closed.operate(case.operator, case.arrays, np.asarray(cotangent), case.differentiate, named=named,
                                    documented=documented, **case.options)  # fmt: skip
    return {f"forward/{case.label}": out} | {f"backward/{case.label}, input {i}": g for i, g in enumerate(gradients)}


def _generation(closed: Introspection, fixture: Fixture) -> Tensors:
    tokens, logits_BTV = closed.generate(fixture.prompts(), NEW_TOKENS, STOP)
    found = {"tokens/greedy": tokens, "tokens/greedy, by the engine": closed.engine.generate(fixture.prompts(), NEW_TOKENS, STOP)}
    return found | {f"forward/logits, token {t}": logits_BTV[:, t] for t in range(logits_BTV.shape[1])}


def reset(engine: TrainEngine, fixture: Fixture) -> None:
    """Resets an engine to the fixture's start weights and to moments of zero."""
    engine.load("model", fixture.weights.items())
    teacher = [(f"teacher{n.removeprefix('vision')}", v) for n, v in fixture.weights.items() if part_of(n) == "vision"]
    if next(iter(engine.tensors("teacher")), None) is not None:
        engine.load("teacher", teacher)
    for group in ("first_moment", "second_moment"):
        engine.load(group, [(name, np.zeros_like(array)) for name, array in engine.tensors(group)])


def training_step(engine: TrainEngine, fixture: Fixture) -> Tensors:
    """One training step of accumulated micro-batches: losses, norm, clipped gradients; moments, weights and teacher after it."""
    batches = fixture.step_batches(1)
    result = engine.step(batches, fixture.step_inputs(1, batches))
    values = vars(result)
    order = (*reversed(LOSSES), *(name for name in values if name not in LOSSES))
    found: Tensors = {f"loss/{name}": np.array(values[name]) for name in order}
    beta = engine.config.optimizer.betas[0]
    found |= {f"clipped gradient/{name}": moment / (1 - beta) for name, moment in _ordered(engine, "first_moment", fixture)}
    return found | _state(engine, fixture, *KINDS)


def _state(engine: TrainEngine, fixture: Fixture, *groups: Group) -> Tensors:
    """The tensors of some groups of an engine, in the order of the fixture's weights."""
    return {f"{KINDS[group]}/{name}": array for group in groups for name, array in _ordered(engine, group, fixture)}


def _ordered(engine: TrainEngine, group: Group, fixture: Fixture) -> list[tuple[str, np.ndarray]]:
    """A group's tensors in the order of the fixture's weights, which may not be the framework's own order."""
    order = {name.removeprefix("vision."): i for i, name in enumerate(fixture.weights)}
    bare = lambda name: name.removeprefix("teacher.").removeprefix("vision.")  # noqa: E731
    return sorted(engine.tensors(group), key=lambda item: order[bare(item[0])])


def _trajectory(engine: TrainEngine, fixture: Fixture, steps: int) -> Tensors:
    """Trains `steps` steps on this rank's share of the micro-batches. Returns losses, gradient norm and each part's distance from
    its start weights for every step, and the weights and the teacher after the last step."""
    rows: dict[str, list[float]] = {}
    for step in range(1, steps + 1):
        batches = fixture.step_batches(step)
        result = engine.step(batches[engine.rank :: engine.world], fixture.step_inputs(step, batches))
        values = {"grad_norm": result.grad_norm, **vars(result), **_distances(engine, fixture)}  # norm first
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    curves = {f"curve/{name}": np.array(values) for name, values in rows.items()}
    return curves | _state(engine, fixture, "model", "teacher")


def _distances(engine: TrainEngine, fixture: Fixture) -> dict[str, float]:
    squares = dict.fromkeys(PARTS, 0.0)
    for name, array in engine.tensors("model"):
        squares[part_of(name)] += float(np.square(array.astype(np.float64) - fixture.weights[name]).sum())
    return {f"distance of {part}": square**0.5 for part, square in squares.items()}


def _two_ranks(fixture: Fixture, framework: str, request: Request) -> Tensors:
    """The trajectory on two ranks, started by the framework's launcher; each rank has one micro-batch of every step."""
    assert MICRO_BATCHES == 2, "one micro-batch for each rank"
    with tempfile.TemporaryDirectory(prefix="granvit-parity-") as folder:
        out, port, binaries = Path(folder) / "trajectory.safetensors", _free_port(), Path(sys.executable).parent
        if framework == "mindspore":
            launcher = [str(binaries / "msrun"), "--worker_num", "2", "--local_worker_num", "2", "--master_port", str(port),
                        "--join", "True", "--log_dir", f"{folder}/msrun"]  # fmt: skip
        else:
            launcher = [str(binaries / "torchrun"), "--nproc_per_node", "2", "--master_port", str(port)]
        options = ["--framework", framework, "--seed", fixture.seed, "--vision", fixture.vision_name, "--language",
                   fixture.language_name, "--steps", request.steps, "--compute", request.compute, "--device", request.device,
                   "--out", out, *(["--fault", request.fault] if request.fault else []),
                   *(["--kernels", *map("=".join, request.kernels.items())] if request.kernels else [])]  # fmt: skip
        root = str(Path(__file__).resolve().parents[1])
        paths = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
                 "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}  # fmt: skip
        done = subprocess.run([*launcher, __file__, *map(str, options)], capture_output=True, text=True,
                              env={"OMP_NUM_THREADS": "1", **os.environ, **paths})  # fmt: skip
        if done.returncode or not out.exists():
            raise RuntimeError(f"two ranks of {framework} failed (exit status {done.returncode}):\n{done.stdout}{done.stderr}")
        order = json.loads(out.with_suffix(".json").read_text())
        tensors = load_file(out)
        return {name: tensors[name] for name in order}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(arguments: list[str] | None = None) -> None:
    """One rank of `_two_ranks`; rank 0 writes what it computed."""
    parser = argparse.ArgumentParser(description="One rank of parity's suite trajectory2; parity/check.py starts it.")
    for name in ("framework", "vision", "language", "compute", "device", "fault"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kernels", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    o = parser.parse_args(arguments)
    load_engine_class(o.framework)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        importlib.import_module("ms_granvit.distributed").join("cpu")
        return
    fixture = make_fixture(o.seed, o.vision, o.language)
    with faults.planted(o.fault, o.framework):
        request = Request((), o.steps, o.compute, o.device, kernels=dict(name.split("=") for name in o.kernels))
        engine = make_engine(o.framework, fixture, configured(fixture, o.framework, "stage1", request))
        found = _trajectory(engine, fixture, o.steps)
    if engine.rank == 0:
        found = {name: np.ascontiguousarray(_storable(array)) for name, array in found.items()}
        o.out.with_suffix(".json").write_text(json.dumps(list(found)))
        save_file(found, o.out)
    engine.close()


if __name__ == "__main__":
    _rank()
