"""The training commands: scripts/STAGE.py and `granvit-train STAGE`."""
import argparse
import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from granvit.agreement import agree, broadcast, ranks_where, together
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.resume import check_same_data, check_same_run
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import CONFIGS, RunConfig, dump_config, find_config, load_config, resolve_models
from granvit.data.batch import Packer
from granvit.data.chat import Chat, load_chat
from granvit.data.loader import Compose, Loader
from granvit.data.sampler import WINDOW
from granvit.engine import Ranks, TrainEngine
from granvit.evaluate import Evaluation, Evaluator, forget_evaluations
from granvit.exit_status import exit_status
from granvit.launch import Guard, Launch, RunLock, check_launcher, check_port, detect_launch, load_engine_class
from granvit.logs import log, log_kernels, to_console, to_file
from granvit.memory import NOTHING_SMALLER, check_memory, memory_errors, smaller_steps
from granvit.models import PARTS, parameter_shapes, part_of
from granvit.preflight import (
    Loading,
    agreed_checkpoint,
    configuration_facts,
    data_facts,
    fingerprints,
    order_facts,
    version_facts,
    weights_facts,
)
from granvit.stages import WITH_SCRIPTS
from granvit.trainer import Trainer

ANY_TRAIN = "$(command -v granvit-train)"
REPLACED = ("checkpoints", "parts", "eval", "tensorboard", "metrics.jsonl", "config.yaml")  # what --fresh moves away


def train_command(
    stage: str, arguments: Sequence[str] | None = None, compose: Compose = Packer.row, script: str | None = None
) -> int:
    """Runs one stage with the options of the command line; returns the exit status.

    `compose` builds a row from a record and its questions (the demo's text pretraining has its own function). `script` is the
    file that a launcher starts, as --help shows it (default: scripts/STAGE.py).
    """
    options = _train_options(stage, arguments, script or f"scripts/{stage}.py")
    try:
        launch = detect_launch()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    to_console(launch.rank)
    guard: list[Guard] = []
    status = exit_status(lambda: _train(stage, options, launch, guard, compose), guard)
    for member in guard:
        member.leave()
    if status and launch.launcher is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a normal exit would wait in the framework for ranks that hang in a collective
    return status


def any_train_command(arguments: Sequence[str] | None = None) -> int:
    """`granvit-train STAGE ...`, the same as `scripts/STAGE.py ...` in a checkout; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="granvit-train",
        description="Trains one of GranViT's stages, as scripts/STAGE.py does in a checkout.",
        epilog=f"`granvit-train STAGE --help` has all options. msrun and torchrun need a file: msrun ... {ANY_TRAIN} stage1 ...",
    )
    parser.add_argument("stage", choices=WITH_SCRIPTS, help="the stage, listed in the paper's order")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="--config, --framework, --fresh, key=value")
    options = parser.parse_args(arguments)
    return train_command(options.stage, options.rest, script=f"{ANY_TRAIN} {options.stage}")


def _train_options(stage: str, arguments: Sequence[str] | None, script: str) -> argparse.Namespace:
    default, small = CONFIGS / f"{stage}.yaml", CONFIGS / "demo" / f"{stage}.yaml"
    parser = argparse.ArgumentParser(
        prog=f"granvit-train {stage}" if script.startswith(ANY_TRAIN) else None,
        description=f"Trains {stage} of GranViT. Without arguments: the paper's run (configs/{stage}.yaml). "
        f"To resume an interrupted run, repeat the command.",
        epilog=f"Examples: msrun --worker_num 2 --local_worker_num 2 --join True {script} train.steps=50;  "
        f"torchrun --nproc_per_node 2 {script} --framework torch"
        + (f" --config configs/demo/{stage}.yaml" if small.exists() else "")
        + f". configs/ is found from any directory: {CONFIGS}.",
    )
    parser.add_argument("--config", default=default, help="YAML of the run (default: %(default)s)")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are moved to a subdirectory of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, as in optimizer.lr=2e-5")
    return parser.parse_intermixed_args(arguments)


def _train(stage: str, options: argparse.Namespace, launch: Launch, guard: list[Guard], compose: Compose) -> None:
    """One run, from the configuration to the last checkpoint."""
    # 1. Read the configuration; check launcher, framework and port.
    config = load_config(find_config(options.config), options.overrides)
    if config.stage != stage:
        raise ValueError(f"{options.config} configures {config.stage!r}, but this script runs {stage!r}")
    if config.runtime.compute == "float16":
        raise ValueError("runtime.compute=float16 is not supported in training, it would need loss scaling; use bfloat16")
    vision, language = resolve_models(config)
    config.local_micro_batches(launch.world)
    run = Path(config.output)
    guard.append(Guard(launch, run))
    check_launcher(launch, options.framework)
    check_port(launch)
    Engine = load_engine_class(options.framework)
    if launch.scheduler:
        _run_scheduler()
        return
    lock = RunLock(run, launch) if launch.rank == 0 else None
    if lock is not None:
        guard[0].remove_old_markers()
        to_file(run, 0)
        if options.fresh:
            _put_aside(run)

    # 2. Join the process group before anything slow; compare versions and configuration.
    ranks = _join(Engine, config, launch, guard[0])
    if launch.rank:
        to_file(run, launch.rank)  # not before rank 0 has the lock on the directory
    agree(ranks, version_facts(options.framework) | configuration_facts(config, vision, language, find_config(options.config)))

    # 3. Choose the weights: this run's newest checkpoint or the start weights. Checks files and names; tensors are read later.
    checkpoint = agreed_checkpoint(ranks, run, wanted=not options.fresh)
    if checkpoint is not None:
        stated = [assignment.partition("=")[0] for assignment in options.overrides]
        if checkpoint.ranks is None:
            log.warning(
                f"{checkpoint.path} was written by an earlier version with another order of the data: in the {WINDOW} steps "
                f"around it some questions are used twice, some never"
            )
        _log_changes(together(ranks, lambda: check_same_run(checkpoint, config, vision, language, ranks.world, stated)))
    init_from = config.model.init_from if checkpoint is None else None
    source = checkpoint if init_from is None else agreed_checkpoint(ranks, Path(init_from))
    start = together(
        ranks,
        lambda: start_weights(config, vision, language, source) if checkpoint is None else checkpoint.tensors("model"),
    )

    together(ranks, lambda: check_memory(config, vision, language, Engine.memory(config.runtime.device)))

    # 4. Open the stores, build the model and load the weights.
    chat = together(ranks, lambda: load_chat(config, language))
    data_fingerprints = together(ranks, lambda: fingerprints(config, chat))
    agree(ranks, together(ranks, lambda: data_facts(config, chat, data_fingerprints)))
    if checkpoint is not None:
        together(ranks, lambda: check_same_data(checkpoint, data_fingerprints))
    loader = together(
        ranks, lambda: Loader(config, vision, chat, launch.rank, launch.world, compose), "counting the tokens of the stores, once"
    )
    if ranks.world > 1:
        agree(ranks, together(ranks, lambda: order_facts(loader)))
    # Other cases need no hashing here: reading a checkpoint compares its hashes, and rank 0's writer hashes the start weights.
    hashes_unknown = ranks.world > 1 and checkpoint is None and launch.rank > 0
    loading = Loading("weights", len(parameter_shapes(vision, language)), hashed=hashes_unknown)

    def build():
        writer: CheckpointWriter | None = None
        recorded = start
        if launch.rank == 0:
            start_hashes = {} if checkpoint is None else {name: part.start for name, part in checkpoint.parts.items()}
            writer = CheckpointWriter(run, config, vision, language, start_hashes, data_fingerprints)
            (run / "config.yaml").write_text(dump_config(config))
            if checkpoint is None:
                recorded = writer.record_start(start)
        return writer, Engine(config, vision, language, loading.watch(recorded), ranks)

    also_waiting_for = f"; rank 0 also writes the start weights to {run / 'parts'}" if checkpoint is None else ""
    writer, engine = together(ranks, build, f"loading weights{also_waiting_for}")
    if ranks.world > 1:
        if checkpoint is not None:
            hashes = {name: part.hash for name, part in checkpoint.parts.items()}
        else:
            hashes = loading.hashes() if writer is None else writer.start
        agree(ranks, weights_facts(hashes, config, language, source))
        loaded = ", ".join(f"{part} {digest[:12]}" for part, digest in hashes.items())
        log.info(f"all {ranks.world} ranks hold the same versions, configuration, tokenizer, stores and weights: {loaded}")
    guard[0].take_signals()
    _log_start(config, engine, options.framework, chat, loader, writer)
    _compare_kernels(ranks, engine.kernels.names)
    evaluator = None
    if config.eval.source:
        if launch.rank == 0:
            forget_evaluations(run, -1 if checkpoint is None else checkpoint.step)
        evaluator = together(ranks, lambda: Evaluator(engine, config, vision, chat, run, compose))

    # 5. Train.
    def evaluate(step: int) -> Evaluation | None:
        smaller = [f"eval.batch={config.eval.batch // 2}"] if config.eval.batch > 1 else []
        with memory_errors(lambda: f"in the evaluation after step {step}", run, smaller, "eval.batch is 1 already"):
            assert evaluator is not None
            return evaluator(step)

    trainer = Trainer(
        config, engine, loader, run, writer, lambda: guard[0].stop_requested, None if evaluator is None else evaluate
    )
    smaller = smaller_steps(config, ranks.world)
    with memory_errors(lambda: f"in step {trainer.step + 1}", run, smaller, NOTHING_SMALLER):
        complete = trainer.run(checkpoint)
    log.info(f"compilations: {engine.compilations or 'none (eager)'}")
    log.info(f"run {run} is complete" if complete else f"run {run} is not complete: the same command resumes it")
    engine.close()
    if lock is not None:
        lock.release()


def _join(Engine: type[TrainEngine], config: RunConfig, launch: Launch, guard: Guard) -> Ranks:
    """Joins the process group. If a rank fails to join, the framework's timeout or the watcher ends this process."""
    if launch.world > 1:
        log.info(f"waiting for {launch.world} ranks to meet at {launch.address}")
    ranks = Engine.join(config.runtime.device)
    guard.take_signals()
    if (ranks.rank, ranks.world) != (launch.rank, launch.world):
        raise RuntimeError(f"the framework says rank {ranks.rank} of {ranks.world}, the launcher {launch.rank} of {launch.world}")
    return ranks


def _log_changes(changed: list[str]) -> None:
    """Logs the settings in which a resumed run differs from the run before."""
    for line in changed:
        if line.startswith("runtime.compute"):
            log.warning(f"{line}: from here on rounding differs in every step")
        else:
            log.info(f"resumed with {line}")


def _compare_kernels(ranks: Ranks, names: Mapping[str, str]) -> None:
    """Warns if ranks run other kernels than rank 0, as where one machine lacks the C++ kernels. All ranks must call it."""
    if ranks.world == 1:
        return
    own = json.dumps(names)
    differing = ranks_where(ranks, own != broadcast(ranks, own, 0))
    if differing:
        shown = ", ".join(map(str, differing[:8])) + (", ..." if len(differing) > 8 else "")
        log.warning(f"rank(s) {shown} run other kernels than rank 0 and round differently; their log files say which and why")


def _log_start(config: RunConfig, engine, framework: str, chat: Chat, loader: Loader, writer: CheckpointWriter | None) -> None:
    log.info(f"{config.stage} in {framework} on {engine.device}, {engine.world} rank(s), {loader.steps} steps, {chat.origin}")
    log.info(f"a step: {config.train.global_batch} rows of up to {config.data.regions_per_row} region question(s)")
    log_kernels(engine.kernels)
    if writer is None:
        return
    for part in PARTS:
        numbers = sum(math.prod(shape) for name, shape in writer.model_shapes.items() if part_of(name) == part)
        what = "trained" if part in writer.trains else "frozen"
        log.info(f"{part}: {numbers:,} parameters, {what}, start weights {writer.start[part][:12]}")
    spec = config.stage_spec
    if spec.distill and not any(spec.mix.get(task, 0) > 0 for task in ("bbox2caption", "caption2bbox")):
        log.warning(
            "self-distillation has no effect in this run: it compares features of the regions in questions, and data.mix has "
            "neither bbox2caption nor caption2bbox"
        )


def _put_aside(run: Path) -> None:
    """--fresh: moves an earlier run's files into RUN/replaced-<time>."""
    earlier_files = [run / name for name in REPLACED if (run / name).exists()]
    if earlier_files:
        aside = run / time.strftime("replaced-%Y%m%d-%H%M%S")
        aside.mkdir()
        for path in earlier_files:
            path.rename(aside / path.name)
        log.info(f"--fresh: the earlier run is now in {aside}")


def _run_scheduler() -> None:
    """Runs the cluster's scheduler, for which msrun starts this script once more. It ends when all workers have left."""
    importlib.import_module("ms_granvit.distributed").join("cpu")
