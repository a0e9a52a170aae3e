"""Converts checkpoints between the default (canonical) layout and those of other programs, tensor by tensor.

    python parity/convert.py SRC DST --to LAYOUT [--from LAYOUT] [--no-verify]

SRC is a publisher's directory, a run's directory or one of its checkpoints (RUN/checkpoints/step_0001000), or one .safetensors or
.ckpt file. DST must not exist: a name that ends in .safetensors or .ckpt becomes one file, any other a directory with a
config.json beside the tensors. Tokenizers and preprocessing files are not copied: scripts/export_hf.py writes those too.

layouts:
  default      this project's own names; any of its parts
  siglip, clip, aimv2, internvit
               SigLIP and SigLIP2, CLIP, AIMv2, InternViT of transformers: the encoder (a text tower in SRC is left out)
  aimv2-apple, internvit-hub
               AIMv2 and SAILViT, InternViT with their publishers' own names: the encoder
  qwen2        Qwen2 and Qwen2.5 of transformers: the decoder
  llama        Llama of transformers: the decoder
  llava        LlavaForConditionalGeneration of transformers: encoder, projector and decoder
  mindformers  Llama and Qwen2 of MindFormers: the decoder, a .ckpt file
  mindspore    this project's own names in a .ckpt file

Every tensor keeps its bytes and its dtype. Tensors in SRC that LAYOUT does not have are listed with the reason; an unknown tensor
is an error. Exit status: 0 done, 2 refused (DST is not created).
"""
import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from granvit.checkpoint.combined_tensors import combine, name_in_file, shape_in_file
from granvit.checkpoint.contents import Contents, common_name, filler_value, left_out_lines, open_contents
from granvit.checkpoint.detect import LAYOUTS, OURS, layout_named
from granvit.checkpoint.layouts import Layout, Spelling
from granvit.checkpoint.layouts.default import DEFAULT
from granvit.checkpoint.layouts.llava import FINAL_DIFFERS, LLAVA
from granvit.checkpoint.layouts.mindspore import MINDSPORE, CkptFile, CkptWriter
from granvit.checkpoint.source import Source
from granvit.checkpoint.tensors import (
    SHARD_BYTES,
    StoredTensors,
    TensorSet,
    TensorWriter,
    shape_differences,
    sync_directory,
    temp_folder,
    write_synced,
)
from granvit.config import merge
from granvit.models import PARTS, Shapes, VisionConfig, part_of, vision_shapes

IN_CKPT = ("mindformers", "mindspore")
EXAMPLES = """examples:
  python parity/convert.py models/siglip2-so400m-patch16-512 siglip2-default --to default
  python parity/convert.py runs/stage2 granvit-llava --to llava           # the newest checkpoint of a run
  python parity/convert.py runs/stage2/checkpoints/step_0001000 decoder --to qwen2
  python parity/convert.py models/Qwen2.5-1.5B-Instruct qwen.ckpt --to mindformers
  python parity/convert.py qwen.ckpt qwen-default --to default --from mindformers"""
ProgressCallback = Callable[[str, int, int], None]  # name of the step, bytes done, total bytes


@dataclass
class Report:
    """The result of a conversion. `left_out` maps names in the source to reasons, `filled` lists fillers in the target."""

    source: Path
    destination: Path
    from_layout: str
    to_layout: str
    tensors: int = 0
    bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: bool = False
    seconds: float = 0.0


@dataclass
class Plan:
    """What to write. `names` maps each target name to the source's names of its parts in order, `fillers` to a value; `config` is
    the content of config.json, None without a complete configuration."""

    names: dict[str, list[str]]
    shapes: Shapes
    dtypes: dict[str, np.dtype]
    fillers: dict[str, float]
    config: dict[str, Any] | None


def make_plan(source: Source, contents: Contents, target: Layout, report: Report) -> Plan:
    """Maps every tensor to its name in the target; `ValueError` if it has none, or the target needs a part that is missing."""
    held = {part_of(name) for name in contents.names}
    holds = ", ".join(part for part in PARTS if part in target.parts)
    lacking = target.parts - held
    if lacking and target.name not in OURS:
        raise ValueError(f"{source.path}: holds no {' and no '.join(sorted(lacking))}; the {target.name!r} layout needs {holds}")
    vision = contents.vision if "vision" in target.parts else None
    language = contents.language if "language" in target.parts else None
    try:
        tree = target.write_config(vision, language)
    except ValueError as error:
        raise ValueError(f"{source.path}: cannot be written as {target.name!r}: {error}") from None
    came_from = contents.published if (contents.published or {}).get("layout") == target.name else None
    spelling = target.spellings[came_from["spelling"]] if came_from else target.spelling_for(contents.names)
    plan = Plan({}, {}, {}, {}, None)
    parts: dict[str, dict[str, str]] = {}
    for canonical, foreign in contents.names.items():
        if part_of(canonical) not in target.parts:
            report.left_out[foreign] = f"the {target.name!r} layout has only: {holds}"
            continue
        name = spelling.foreign(canonical)
        if name is None:
            raise ValueError(f"{source.path}: tensor {foreign!r} has no name in the {target.name!r} layout")
        parts.setdefault(name_in_file(name), {})[name] = foreign
        plan.shapes[name_in_file(name)] = shape_in_file(name, source.tensors.shapes[foreign])
    plan.names = {name: [found[part] for part in sorted(found)] for name, found in parts.items()}
    plan.dtypes = {name: source.tensors.dtype(foreign_parts[0]) for name, foreign_parts in plan.names.items()}
    if vision is not None and target.name not in OURS and contents.stated and not came_from:
        _complete_tower(source, contents, vision, spelling, plan, report)
    if contents.stated:
        plan.config = _config(tree, source, contents, target, plan, came_from, report)
    return plan


def _complete_tower(
    source: Source, contents: Contents, vision: VisionConfig, spelling: Spelling, plan: Plan, report: Report
) -> None:
    """Adds fillers for the blocks above `vision.level` that the source lacks: transformers builds them, but they are not used."""
    dtype = source.tensors.dtype(contents.names["vision.embeddings.patch_embedding.weight"])
    for canonical, shape in vision_shapes(vision.with_all_blocks).items():
        if canonical not in contents.names:
            name = spelling.foreign(canonical)
            assert name is not None, canonical
            plan.fillers[name_in_file(name)] = filler_value(canonical)
            plan.shapes[name_in_file(name)] = shape_in_file(name, shape)
            plan.dtypes[name_in_file(name)] = dtype
    report.filled += plan.fillers


def _config(tree: dict[str, Any], source: Source, contents: Contents, target: Layout, plan: Plan,
            came_from: dict[str, Any] | None, report: Report) -> dict[str, Any]:  # fmt: skip
    """The target's config.json: `tree`, with additional keys of the publisher's config.json and keys derived from the tensors."""
    if target.name in OURS:
        return tree | ({"published": contents.published} if contents.published else {})
    if came_from and came_from["config"].get("model_type") == tree["model_type"]:
        tree = merge(came_from["config"], tree)
    dtypes = {source.tensors.dtype(n).name for names in plan.names.values() for n in names}
    if len(dtypes) == 1 and not {"dtype", "torch_dtype"} & tree.keys():
        tree["torch_dtype"] = dtypes.pop()
    if target is LLAVA:
        assert contents.vision is not None and contents.language is not None
        if "image_token_index" not in tree:
            tree["image_token_index"] = contents.language.vocab - 1
            last_id = tree["image_token_index"]
            report.notes.append(f"image_token_index is set to {last_id}, the last token id: use this id for the image tokens")
        if contents.vision.level == "final":
            report.notes.append(f"load it only with transformers 4.57: {FINAL_DIFFERS}")
    if plan.fillers:
        tree["granvit"] = {"filled": list(plan.fillers)}
    return tree


def _arrays(source: Source, plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor to write, one in memory at a time."""
    for name, parts in plan.names.items():
        yield name, combine(plan.shapes[name], [source.tensors.read(part) for part in parts])
    for name, value in plan.fillers.items():
        yield name, np.full(plan.shapes[name], value, plan.dtypes[name])


def write_plan(source: Source, plan: Plan, target: Layout, destination: Path, verify: bool, report: Report,
               progress: ProgressCallback, accompany: Callable[[Path], None] = lambda folder: None) -> None:  # fmt: skip
    """Writes to a temporary folder, reads back if `verify`, renames. `accompany` writes further files before that.

    `ValueError` if what was read back differs, or `destination` exists.
    """
    one_file = destination.suffix in (".ckpt", ".safetensors")
    as_ckpt = destination.suffix == ".ckpt" or (not one_file and target.name in IN_CKPT)
    sizes = {name: math.prod(plan.shapes[name]) * dtype.itemsize for name, dtype in plan.dtypes.items()}
    destination.parent.mkdir(parents=True, exist_ok=True)
    with temp_folder(destination.with_name(f".tmp-{destination.name}-{os.getpid()}")) as folder:
        inside = folder if one_file else folder / destination.name
        inside.mkdir(exist_ok=True)
        stem = destination.stem if one_file else "model"
        writer: CkptWriter | TensorWriter
        if as_ckpt:
            writer = CkptWriter(inside / f"{stem}.ckpt", plan.shapes)
        else:
            limit = sum(sizes.values()) if one_file else SHARD_BYTES
            checksums = not one_file and target is DEFAULT
            writer = TensorWriter(inside, stem, plan.shapes, limit, dict(target.metadata), checksums)
        done = 0
        with writer:
            for name, array in _arrays(source, plan):
                writer.add(name, array)
                done += array.nbytes
                del array  # before the next one is read
                progress("writing", done, sum(sizes.values()))
            digests = writer.finish()
        if plan.config is not None and not one_file:
            write_synced(inside / "config.json", json.dumps(plan.config, indent=2) + "\n")
        elif plan.config is not None:
            report.notes.append("a single file has no config.json: use a directory as DST to get one")
        accompany(inside)
        if verify:
            written = CkptFile(inside / f"{stem}.ckpt") if as_ckpt else TensorSet(inside, stem)
            _verify(plan, written, digests, sizes, progress)
        sync_directory(inside)
        if os.path.lexists(destination):
            raise ValueError(f"{destination}: was created by another process meanwhile and is left as it is; choose another name")
        os.rename(inside / destination.name if one_file else inside, destination)
        sync_directory(destination.parent)
    report.tensors, report.bytes, report.verified = len(plan.shapes), sum(sizes.values()), verify


def _verify(
    plan: Plan, written: StoredTensors, digests: dict[str, str], sizes: dict[str, int], progress: ProgressCallback
) -> None:
    """`ValueError` if names, shapes, dtypes or the sha256 of a tensor's bytes differ in what was written."""
    found = shape_differences(written.shapes, plan.shapes)
    if found:
        raise ValueError(f"the written file reads back differently: {'; '.join(found)}")
    done = 0
    for name, dtype in plan.dtypes.items():
        if written.dtype(name) != dtype or written.digest(name) != digests[name]:
            raise ValueError(f"{written.entries[name]['path']}: tensor {name!r} reads back differently from what was written")
        done += sizes[name]
        progress("verifying", done, sum(sizes.values()))


def convert(
    source: Path,
    destination: Path,
    to: str,
    from_: str | None = None,
    verify: bool = True,
    progress: ProgressCallback = lambda what, done, total: None,
) -> Report:
    """Converts `source` to the layout `to` at `destination`; everything is checked before the first tensor is written.

    `ValueError` (one line) for invalid input, `OSError` from reading and writing; then `destination` is not created.
    """
    source, destination, start = Path(source), Path(destination), time.perf_counter()
    target = layout_named(to)
    if to == MINDSPORE.name and destination.suffix == ".safetensors":
        raise ValueError(f"{destination}: the layout {to!r} is a .ckpt file; the layout 'default' is the same in safetensors")
    if os.path.lexists(destination):
        raise ValueError(f"{destination}: exists already; remove it or choose another name")
    opened, layout, contents = open_contents(source, from_)
    report = Report(source, destination, layout.name, target.name, left_out=contents.left_out, notes=contents.notes)
    plan = make_plan(opened, contents, target, report)
    write_plan(opened, plan, target, destination, verify, report, progress)
    report.seconds = time.perf_counter() - start
    return report


class Bar(Progress):
    """Progress on stderr: live on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task_of_step: dict[str, TaskID] = {}
        self.shown = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.disable:
            if what not in self.task_of_step:
                self.task_of_step[what] = self.add_task(what, total=total)
            self.update(self.task_of_step[what], completed=done)
        elif time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print(f"{what} {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)


def lines(report: Report) -> Iterator[str]:
    """The report as lines of text: what was left out or added and why, sizes, time and this process's peak memory."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield from left_out_lines(report.left_out)
    if report.filled:
        yield f"added {common_name(report.filled)}: fillers (zeros, norm weights 1) for blocks that only transformers builds"
    yield from (f"note: {note}" for note in report.notes)
    yield (
        f"{report.from_layout} -> {report.to_layout}: {report.tensors} tensors, {report.bytes / 1e9:.3f} GB, "
        f"{'verified' if report.verified else 'not verified'}, {report.seconds:.1f} s, "
        f"peak memory {peak_kib * 1024 / 1e6:.0f} MB"
    )


def run_command(work: Callable[[ProgressCallback], Report]) -> int:
    """Runs `work` with a progress bar; prints its report, or its error in one line. Returns the exit status.

    SIGTERM ends the process with exit status 143 after temporary files are removed. Only for the main thread.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Bar() as bar:
            report = work(bar)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n".join(lines(report)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint to convert; not changed")
    parser.add_argument("destination", metavar="DST", type=Path, help="file or directory to create; must not exist")
    parser.add_argument("--to", metavar="LAYOUT", required=True, choices=tuple(LAYOUTS), help="the layout of DST")
    parser.add_argument("--from", dest="from_", metavar="LAYOUT", choices=tuple(LAYOUTS), help="that of SRC (default: detected)")
    parser.add_argument("--no-verify", action="store_true", help="do not read back what was written")
    options = parser.parse_args(arguments)
    verify = not options.no_verify
    return run_command(lambda bar: convert(options.source, options.destination, options.to, options.from_, verify, bar))
