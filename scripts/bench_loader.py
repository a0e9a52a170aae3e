"""The benchmark `loader` of scripts/bench.py: what one core reads, decodes, resizes and packs, against what one NPU consumes.

The pictures are photographs that come with scikit-image, enlarged and with a camera's noise, as JPEG of quality 90. Times are of
the processor and of one thread, so other work on the machine changes them little; only the table of reading processes has wall
times.
"""
import ctypes
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from bench_process import alone, memory
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from granvit.config import CONFIGS, RunConfig, load_config, resolve_models
from granvit.data import batch as packing
from granvit.data.chat import load_chat
from granvit.data.images import crop, decode, to_views
from granvit.data.loader import Loader
from granvit.data.prompts import Box
from granvit.data.records import ImageRecord, Region
from granvit.data.store import MAX_PIXELS
from granvit.data.store_writer import write_store
from granvit.demo.pair import SHIPPED
from granvit.plan import DEVICES, Fleet, Plan, paper_images

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
SIZES = ((1024, 768), (2048, 1536))
KEPT, OTHER = "kept", "simplejpeg"  # variants: glibc does not give freed memory back; another decoder
VARIANTS: tuple[tuple[str, ...], ...] = ((), (KEPT,), (OTHER,), (KEPT, OTHER))
CASES = (("stage1_packed", SIZES[0], ()), *(("stage1", size, variant) for size in SIZES for variant in VARIANTS))
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
NPU = Fleet("910B3", DEVICES["910B3"], 1, 0.4)
NOISE, QUALITY = 6.0, 90  # standard deviation in 8-bit steps; of JPEG
IMAGES, REGIONS = 12, 6  # of the store; of each image (Gran-29M has 6.2)
ROWS, AHEAD = 48, 6  # rows timed in one thread; steps of 12 rows before reading processes are timed
PARTS = {"decode": "decode", "to_views": "student", "crop": "crops"}  # functions of the packer
SCALES, REPEATS = (1, 2, 4), 5  # factors of scaled decoding; how often each file is decoded for the median


def photographs(size: tuple[int, int], count: int) -> list[bytes]:
    """JPEG files of photographs of this width and height."""
    import skimage.data

    rng, files = np.random.default_rng(0), []
    for number in range(count):
        name = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        photograph = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(photograph) + rng.normal(0, NOISE, (size[1], size[0], 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files


def boxes(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[Box]:
    """Boxes with sides of 100 pixels (the smallest that the paper's filter keeps) to the whole image, log-uniform."""
    found = []
    for _ in range(count):
        width, height = (float(np.exp(rng.uniform(np.log(100 / side), 0))) for side in size)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        found.append((x, y, x + width, y + height))
    return found


def records(size: tuple[int, int], count: int) -> Iterator[ImageRecord]:
    """Photographs with regions and global captions of about the paper's lengths."""
    rng = np.random.default_rng(1)
    for number, image in enumerate(photographs(size, count)):
        regions = tuple(Region(box, "a red sign with white letters") for box in boxes(rng, size, REGIONS))
        yield ImageRecord(f"photograph {number}", *size, image, "A long caption of the whole picture. " * 12, regions)


def loader_of(run: str, store: Path, workers: int = 1) -> Loader:
    """A loader of one rank for configs/RUN.yaml with this store, and with a tokenizer that is at hand."""
    config = configured(run, store, workers)
    vision, language = resolve_models(config)
    return Loader(config, vision, load_chat(config, language), 0, 1)


def configured(run: str, store: Path, workers: int) -> RunConfig:
    return load_config(CONFIGS / f"{run}.yaml", [
        f"data.sources={json.dumps([{'path': str(store)}])}", f"data.workers={workers}", "train.global_batch=12",
        f"model.tokenizer={SHIPPED / 'language' / 'tokenizer.json'}", "train.epochs=100",
    ])  # fmt: skip


@dataclass
class Cost:
    """Processor seconds of rows: all, and by part; the number of calls of each part; VmHWM of the process in bytes."""

    rows: int
    crops: int
    total: float
    parts: dict[str, float]
    calls: dict[str, int]
    peak: int


@contextmanager
def _timed(name: str, seconds: dict[str, float], calls: dict[str, int]) -> Iterator[None]:
    """Adds up the time of a function that the packer calls."""
    function: Callable = getattr(packing, name)

    def timed(*arguments: object) -> object:
        began = time.thread_time()
        try:
            return function(*arguments)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.thread_time() - began
            calls[name] = calls.get(name, 0) + 1

    with mock.patch.object(packing, name, timed):
        yield


def cost_of_rows(loader: Loader, micro_batches: int) -> Cost:
    """Makes micro-batches in this thread."""
    loader._assemble(0)  # reads the index
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    rows = crops = 0
    with _timed("decode", seconds, calls), _timed("to_views", seconds, calls), _timed("crop", seconds, calls):
        began = time.thread_time()
        for number in range(micro_batches):
            made = loader._assemble(number)
            rows, crops = rows + int(made["image_weights_B"].sum()), crops + int(made["box_weights_BK"].sum())
        total = time.thread_time() - began
    return Cost(rows, crops, total, seconds, calls, memory("VmHWM"))


def consumed(run: str) -> float:
    """Rows that one NPU trains on in a second, by formula: as this code runs them (`granvit.plan`)."""
    config = load_config(CONFIGS / f"{run}.yaml")
    plan = Plan(config, *resolve_models(config), paper_images(config.stage_spec.mix))
    return sum(plan.rows.values()) * NPU.speed / plan.epoch_as_run


def case(run: str, store: Path, variant: tuple[str, ...]) -> Cost:
    """The cost of `ROWS` rows in a variant; for a separate process, because glibc cannot be set back."""
    if KEPT in variant:
        libc = ctypes.CDLL(None)
        assert libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
    decoder = (lambda data, max_pixels: _simplejpeg(data, 1)) if OTHER in variant else decode
    with mock.patch.object(packing, "decode", decoder):
        loader = loader_of(run, store)
        return cost_of_rows(loader, ROWS // loader._assemble.micro_batch)


def loading(console: Console, stores: dict[tuple[int, int], Path]) -> None:
    """Prints what one core makes, and how many cores an NPU needs."""
    title = f"one core, photographs to rows at 512 pixels; one {NPU.name} at {NPU.mfu:.0%} of its peak"
    caption = (
        "decode, student (resize), crops (cut and resize), rest: ms of a row. rows/s: what the NPU consumes, by formula. cores: "
        "for one NPU. MB: VmHWM. kept: glibc keeps freed memory. simplejpeg: decodes instead of Pillow"
    )
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "photographs", "images/s", "crops/s", "ms/row", *PARTS.values(), "rest", "rows/s", "cores", "MB"):
        table.add_column(column, justify="left" if column in ("run", "photographs") else "right", no_wrap=True)
    for run, size, variant in CASES:
        if OTHER in variant and OTHER not in decoders():
            continue
        cost = alone(case, run, stores[size], variant)
        assert cost.calls["decode"] == cost.rows, "the loader decodes an image twice in a row"
        each = {part: cost.parts[part] / cost.rows * 1e3 for part in PARTS}
        row, wanted = cost.total / cost.rows * 1e3, consumed(run)
        table.add_row(", ".join((run, *variant)), f"{size[0]} x {size[1]}", f"{1e3 / row:.1f}", f"{cost.crops / cost.total:.1f}",
                      f"{row:.1f}", *(f"{each[part]:.1f}" for part in PARTS), f"{row - sum(each.values()):.1f}", f"{wanted:.1f}",
                      f"{wanted * row / 1e3:.2f}", f"{cost.peak / 1e6:.0f}")  # fmt: skip
    console.print(table)


Decoder = Callable[[bytes, int], np.ndarray]  # a JPEG file and the factor by which to reduce it -> RGB `[H, W, 3]`


def _pillow(data: bytes, factor: int) -> np.ndarray:
    if factor == 1:
        return decode(data, MAX_PIXELS)
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    image.draft("RGB", (image.width // factor, image.height // factor))
    return np.asarray(image.convert("RGB"))


def _simplejpeg(data: bytes, factor: int) -> np.ndarray:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    smallest = {"min_height": height // factor, "min_width": width // factor, "min_factor": factor} if factor > 1 else {}
    return simplejpeg.decode_jpeg(data, "RGB", **smallest)


def decoders() -> dict[str, Decoder]:
    """The decoders that are installed, by name."""
    return {"Pillow": _pillow} | ({"simplejpeg": _simplejpeg} if importlib.util.find_spec("simplejpeg") else {})


def _differences(ours: list[np.ndarray], others: list[np.ndarray]) -> str:
    """The largest and the mean difference of pixels in 8-bit steps."""
    apart = [np.abs(a.astype(np.int16) - b) for a, b in zip(ours, others, strict=True)]
    return f"{max(int(x.max()) for x in apart)}, {np.mean([x.mean() for x in apart]):.2f}"


def decoding(console: Console, size: tuple[int, int]) -> None:
    """Prints the time of each decoder, and how far pixels are from those of the loader."""
    config = load_config(CONFIGS / "stage1.yaml")
    vision, rng = resolve_models(config)[0], np.random.default_rng(2)
    files = photographs(size, len(PHOTOGRAPHS))
    where = [boxes(rng, size, 1)[0] for _ in files]

    def views(images: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        cut = [crop(image, box, 1.0, vision.image_size, vision.resize) for image, box in zip(images, where, strict=True)]
        return [to_views(image, vision) for image in images], cut

    bits = 8 * sum(map(len, files)) / (len(files) * size[0] * size[1])
    table = Table(title=f"JPEG of {size[0]} x {size[1]}, {bits:.1f} bits a pixel", box=SIMPLE_HEAD)
    for column in ("decoder", "reduced by", "ms an image", "of Pillow's", "student: largest, mean", "crop: largest, mean"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    ours, pillow = None, 0.0
    for name, decoder in decoders().items():
        for factor in SCALES:
            images = [decoder(file, factor) for file in files]
            times = []
            for file in files * REPEATS:
                began = time.thread_time()
                decoder(file, factor)
                times.append(time.thread_time() - began)
            each, found = float(np.median(times)), views(images)
            ours, pillow = ours or found, pillow or each
            table.add_row(name, str(factor), f"{each * 1e3:.1f}", f"{each / pillow:.2f}", _differences(ours[0], found[0]),
                          _differences(ours[1], found[1]))  # fmt: skip
    console.print(table)
    if "simplejpeg" not in decoders():
        console.print("simplejpeg is not installed (pip install simplejpeg)")


def _read(store: Path, workers: int) -> float:
    """Rows per second (wall) that the loader's reading processes hand over, after they have filled their queues."""
    batches = loader_of("stage1", store, workers).batches()
    for _ in range(AHEAD):
        next(batches)
    began = time.perf_counter()
    rows = sum(int(micro.image_weights_B.sum()) for _ in range(2 * AHEAD) for micro in next(batches))
    speed = rows / (time.perf_counter() - began)
    batches.close()
    return speed


def reading(console: Console, store: Path) -> None:
    """Prints the speed of the loader with one and two reading processes."""
    table = Table(title="stage1, reading processes (wall)", box=SIMPLE_HEAD)
    for column in ("processes", "images/s", "of one"):
        table.add_column(column, justify="right")
    speeds = [alone(_read, store, workers) for workers in (1, 2)]
    for workers, speed in enumerate(speeds, 1):
        table.add_row(str(workers), f"{speed:.1f}", f"{speed / speeds[0]:.2f}")
    console.print(table)


def loader(console: Console) -> None:
    """Prints the tables of the loader."""
    with tempfile.TemporaryDirectory() as temporary:
        stores = {size: Path(temporary, str(size[0])) for size in SIZES}
        for size, store in stores.items():
            write_store(records(size, IMAGES), store)
        loading(console, stores)
        for size in SIZES:
            decoding(console, size)
        reading(console, stores[SIZES[0]])
