"""Benchmarks. They print ratios of quantities that were measured in the same run and, where there is one, the limit.

    python scripts/bench.py packing [--framework mindspore|torch]     regions/s of shared-prefix rows against separate rows
    python scripts/bench.py twins                                     a training step of one framework against the other
    python scripts/bench.py convert [--gigabytes 0.5]                 parity/convert.py against a plain copy of the same file
    python scripts/bench.py encoders                                  every encoder row at full size against transformers
    python scripts/bench.py load                                      memory while SigLIP2 and Qwen2.5-1.5B are loaded
    python scripts/bench.py order [--scale 90|paper]                  steps and padding under several orders of the data; `paper`:
                                                                      time and memory of the order at the paper's scale
    python scripts/bench.py seeds --other CHECKOUT                    a toy stage 1 in this checkout's order and another's
    python scripts/bench.py memory --config configs/stage1.yaml       predicted memory of a training step of full size
    python scripts/bench.py memory --peaks                            measured: a decoder layer and the cross-entropy on this CPU
    python scripts/bench.py build [--records 20000]                   speed of scripts/build_gran.py, and its memory
    python scripts/bench.py kernels                                   every implementation of every operator against `composed`
    python scripts/bench.py ascendc                                   roofline estimate of the Ascend C kernels
    python scripts/bench.py loader                                    what a core decodes and packs against what an NPU consumes
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import bench_ascendc
import bench_build
import bench_kernels
import bench_loader
import bench_loading
import bench_order
import bench_peaks
import ml_dtypes
import numpy as np
from bench_process import alone
from rich.console import Console
from rich.table import Table

from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.tensors import TensorWriter
from granvit.config import RunConfig, language_config, parse_config, vision_config
from granvit.cost import training_flops
from granvit.data.batch import Batch
from granvit.engine import StepInputs, TrainEngine
from granvit.init import initial_values
from granvit.launch import load_engine_class
from granvit.models import LanguageConfig, VisionConfig, language_shapes, parameter_shapes
from granvit.stages import STAGES

PREFIX, QUESTION, ANSWER = 20, 48, 8  # text tokens: prefix around the image, one region question, its answer


@dataclass(frozen=True)
class Size:
    """A pair of models to measure, the number of images in a step, and the side of the teacher's crops in pixels."""

    name: str
    vision: VisionConfig
    language: LanguageConfig
    images: int
    crop: int


DEMO = Size("demo", vision_config("demo-vision"), language_config("demo-language"), images=8, crop=48)
MID = Size(
    "mid-size",
    VisionConfig(name="mid", image_size=224, patch_size=14, width=384, layers=13, heads=6, mlp=1536),
    LanguageConfig(name="mid", vocab=4096, width=512, layers=6, heads=8, kv_heads=2, head_dim=64, mlp=1536, rope_theta=1e6,
                   norm_eps=1e-6, tied_head=True, qkv_bias=True),
    images=2,
    crop=112,
)  # fmt: skip


def synthetic_batch(size: Size, rows: int, regions: int, crops: bool) -> Batch:
    """Random pixels and tokens in the shapes of real rows; each row has one image and `regions` questions."""
    rng, N = np.random.default_rng(0), size.vision.patches
    prefix, span = PREFIX + N, QUESTION + ANSWER
    length, answers = prefix + regions * span, regions * ANSWER
    starts = prefix + span * np.arange(regions)
    positions = np.concatenate([np.arange(prefix), np.tile(prefix + np.arange(span), regions)])
    segments = np.concatenate([np.zeros(prefix), 1 + np.arange(regions).repeat(span)])
    at = (starts[:, None] + QUESTION - 1 + np.arange(ANSWER)).reshape(-1)
    tokens = rng.integers(1, size.language.vocab, (rows, length))
    K = regions if crops else 0
    corners = np.sort(rng.uniform(0, 1, (rows, K, 2, 2)), axis=2).reshape(rows, K, 4)

    def tile(row: np.ndarray) -> np.ndarray:
        return np.tile(row.astype(np.int32), (rows, 1))

    return Batch(
        pixels_B3RR=rng.integers(0, 256, (rows, 3, size.vision.image_size, size.vision.image_size)).astype(np.uint8),
        image_weights_B=np.ones(rows, np.float32),
        token_ids_BS=tokens.astype(np.int32),
        positions_BS=tile(positions),
        segments_BS=tile(segments),
        image_positions_BN=tile(PREFIX // 2 + np.arange(N)),
        answer_positions_BA=tile(at),
        answer_targets_BA=tokens[:, at + 1].astype(np.int32),
        answer_weights_BA=np.ones((rows, answers), np.float32),
        boxes_BK4=corners.astype(np.float32),
        box_weights_BK=np.ones((rows, K), np.float32),
        crops_BK3rr=rng.integers(0, 256, (rows, K, 3, size.crop, size.crop)).astype(np.uint8),
        record_ids=("",) * rows,
        questions=rows * regions,
    )


def config_for(size: Size, regions: int, crops: bool) -> RunConfig:
    """A stage-1 run of this size, with or without the teacher."""
    return parse_config(
        {
            "stage": "stage1",
            "output": "unused",
            "data": {"sources": [{"path": "unused"}], "regions_per_row": regions, "buckets": [{"length": 1, "answers": 1}]},
            "train": {"global_batch": 1, "micro_batch": 1},
            "distill": {"weight": 1.0 if crops else 0.0, "crop_size": size.crop},
        },
        "bench",
    )


def seconds_per_step(framework: str, size: Size, regions: int, rows: int, crops: bool, repeats: int) -> float:
    """Median seconds of a training step (forward, backward, update), after one step to compile and warm up. It runs in a separate
    process, because MindSpore does not free the memory of a graph, and the graphs of one table do not fit into 24 GB together."""
    return alone(_seconds_per_step, framework, size, regions, rows, crops, repeats)


def _seconds_per_step(framework: str, size: Size, regions: int, rows: int, crops: bool, repeats: int) -> float:
    start = initial_values(parameter_shapes(size.vision, size.language), 0)
    config, Engine = config_for(size, regions, crops), load_engine_class(framework)
    engine: TrainEngine = Engine(config, size.vision, size.language, start.items())
    batch, times = synthetic_batch(size, rows, regions, crops), []
    for step in range(1, repeats + 2):
        start = time.perf_counter()
        engine.step([batch], StepInputs(step, 1e-4, 0.9, batch.tokens, batch.boxes))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def train_macs(size: Size, regions: int, rows: int, crops: bool) -> float:
    """Multiply-accumulates of a stage-1 step by formula (`granvit.cost.training_flops`), the teacher on one crop a region."""
    length, answers = PREFIX + size.vision.patches + regions * (QUESTION + ANSWER), regions * ANSWER
    trains, teacher = STAGES["stage1"].trains, crops * regions
    return rows * sum(training_flops(size.vision, size.language, trains, length, answers, teacher, size.crop).values()) / 2


def packing(console: Console, framework: str, regions: int, repeats: int) -> None:
    """Speed with all `regions` questions about an image in one shared-prefix row, against one row for each question."""
    load_engine_class(framework)  # raises here if the framework is not installed
    table = Table(title=f"packing, K = {regions}, {framework}: a training step on the same images and regions")
    for column in ("model", "teacher's crops", "separate, regions/s", "packed, regions/s", "ratio", "limit (by multiplications)"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for size in (DEMO, MID):
        for crops in (False, True):
            speeds = []
            for per_row, rows in ((1, size.images * regions), (regions, size.images)):
                speeds.append(size.images * regions / seconds_per_step(framework, size, per_row, rows, crops, repeats))
            limit = train_macs(size, 1, size.images * regions, crops) / train_macs(size, regions, size.images, crops)
            separate, packed = speeds
            row = (size.name, "with" if crops else "without", f"{separate:.1f}", f"{packed:.1f}", f"{packed / separate:.2f}x",
                   f"{limit:.2f}x")  # fmt: skip
            console.print(f"[dim]{'  '.join(row)}[/]", highlight=False)  # the table takes minutes: show rows at once
            table.add_row(*row)
    console.print(table)


def twins(console: Console, regions: int, repeats: int) -> None:
    """The same training step (stage 1 with the teacher, packed) in both frameworks."""
    table = Table(title=f"a training step, K = {regions}, float32")
    for column in ("model", "PyTorch, s", "MindSpore, s", "PyTorch / MindSpore"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for size in (DEMO, MID):
        torch_s, mindspore_s = (
            seconds_per_step(framework, size, regions, size.images, True, repeats) for framework in ("torch", "mindspore")
        )
        table.add_row(size.name, f"{torch_s:.3f}", f"{mindspore_s:.3f}", f"{torch_s / mindspore_s:.2f}x")
    console.print(table)


def write_decoder(directory: Path, gigabytes: float) -> int:
    """Writes a Qwen2 file of about this size in bfloat16, in the published layout; returns the bytes of its largest tensor."""
    width, mlp, vocab = 1024, 4096, 32768
    block = 2 * (3 * width * mlp + 2 * width * width + 2 * width * width // 4)
    layers = max(1, round((gigabytes * 1e9 - 2 * vocab * width) / block))
    language = LanguageConfig(name="bench", vocab=vocab, width=width, layers=layers, heads=16, kv_heads=4, head_dim=64, mlp=mlp,
                              rope_theta=1e6, norm_eps=1e-6, tied_head=True, qkv_bias=True)  # fmt: skip
    shapes = {QWEN2.spellings[0].foreign(name): shape for name, shape in language_shapes(language).items()}
    rng = np.random.default_rng(0)
    with TensorWriter(directory, "model", shapes, shard_bytes=sys.maxsize, checksums=False) as writer:
        for name, shape in shapes.items():
            writer.add(name, rng.integers(0, 1 << 15, shape, np.uint16).view(ml_dtypes.bfloat16))
        writer.finish()
    (directory / "config.json").write_text(json.dumps(QWEN2.write_config(None, language)))
    return max(int(np.prod(shape)) for shape in shapes.values()) * 2


CONVERT = """
import sys
from pathlib import Path
from granvit.checkpoint.convert import convert
report = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], verify=sys.argv[4] == "yes")
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.seconds, peak * 1024)
"""  # not getrusage: a child process inherits its peak from the parent


def conversion(console: Console, gigabytes: float, repeats: int) -> None:
    """Copies and converts the same file in turn and prints medians. Each conversion runs in a separate process. Linux only."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        largest = write_decoder(folder / "source", gigabytes)
        file = folder / "source" / "model.safetensors"
        size = file.stat().st_size
        table = Table(title=f"a Qwen2-like file of {size / 1e9:.2f} GB, bfloat16, largest tensor {largest / 1e6:.0f} MB")
        for column in ("what", "GB/s", "time / copy", "peak memory, MB"):
            table.add_column(column, justify="left" if column == "what" else "right")
        cases = [(to, verify) for to in ("default", "mindformers") for verify in ("no", "yes")]
        times: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for _ in range(repeats):
            start = time.perf_counter()
            shutil.copyfile(file, folder / "copy")
            times.setdefault("shutil.copyfile", []).append(time.perf_counter() - start)
            (folder / "copy").unlink()
            for to, verify in cases:
                command = [sys.executable, "-c", CONVERT, folder / "source", folder / "converted", to, verify]
                done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
                what = f"qwen2 -> {to}{', verified' if verify == 'yes' else ''}"
                seconds, peak = done.stdout.split()
                times.setdefault(what, []).append(float(seconds))
                peaks[what] = max(peaks.get(what, 0), int(peak))
                shutil.rmtree(folder / "converted")
        copy = float(np.median(times["shutil.copyfile"]))
        for what, measured in times.items():
            seconds = float(np.median(measured))
            peak = f"{peaks[what] / 1e6:.0f}" if what in peaks else ""
            table.add_row(what, f"{size / seconds / 1e9:.2f}", f"{seconds / copy:.2f}x", peak)
    console.print(table)


def scale(text: str) -> int | str:
    """`--scale`: a whole number above 0, or `paper`."""
    if text != "paper" and int(text) < 1:
        raise ValueError
    return text if text == "paper" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("packing", "twins", "convert", "encoders", "load", "memory", "order", "seeds", "build", "loader",
             "kernels", "ascendc")
    parser.add_argument("what", choices=names)
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore")
    parser.add_argument("--regions", type=int, default=6, help="questions per image (default 6; the paper's data has 6.2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median is printed (default 5)")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the file to convert (default 0.5)")
    parser.add_argument("--other", type=Path, help="with seeds: the checkout of this repository to compare with")
    parser.add_argument("--config", default="configs/stage1.yaml", help="with memory: the run's file (default: %(default)s)")
    parser.add_argument("--peaks", action="store_true", help="with memory: measure operators on this CPU instead")
    records_help = "with build: the records over which memory is measured (default: %(default)s)"
    parser.add_argument("--records", type=int, default=20_000, help=records_help)
    scale_help = "with order: the paper's images for each simulated one, or `paper` (default: %(default)s)"
    parser.add_argument("--scale", type=scale, default=90, help=scale_help)
    args = parser.parse_args()
    console = Console(width=130)
    if args.records < 1 or args.records % bench_build.MEMORY_UNITS:
        parser.error(f"--records {args.records}: expected a multiple of {bench_build.MEMORY_UNITS}")
    if args.what == "packing":
        packing(console, args.framework, args.regions, args.repeats)
    elif args.what == "convert":
        conversion(console, args.gigabytes, args.repeats)
    elif args.what == "memory" and args.peaks:
        bench_peaks.peaks(console)
    elif args.what == "memory":
        import bench_memory  # imports PyTorch, which the others do not need

        bench_memory.memory(console, args.config)
    elif args.what in ("encoders", "load"):
        getattr(bench_loading, args.what)(console)
    elif args.what == "kernels":
        bench_kernels.kernels(console, args.repeats)
    elif args.what == "ascendc":
        bench_ascendc.main()
    elif args.what == "build":
        bench_build.build(console, args.records)
    elif args.what == "loader":
        bench_loader.loader(console)
    elif args.what == "order":
        if args.scale == "paper":
            bench_order.paper_scale(console)
        else:
            bench_order.order(console, args.scale)
    elif args.what == "seeds":
        if args.other is None:
            parser.error("seeds needs another checkout to compare with: --other DIRECTORY")
        bench_order.seeds(console, args.other)
    else:
        twins(console, args.regions, args.repeats)


if __name__ == "__main__":
    main()
