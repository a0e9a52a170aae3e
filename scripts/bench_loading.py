"""The benchmarks `encoders` and `load` of scripts/bench.py: both packages load files of full size. Linux only."""
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_process import Peak, alone
from rich.console import Console
from rich.table import Table

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.tensors import TensorWriter
from granvit.config import language_config, vision_config
from granvit.models import LanguageConfig, Shapes, VisionConfig, language_shapes, vision_shapes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests/, which is not installed
PACKAGES = {"torch": "pt_granvit", "mindspore": "ms_granvit"}


def _publish(row: str, folder: Path) -> float:
    """Writes an encoder row's files and one image's features at every level; returns transformers' seconds for the features."""
    import torch

    from tests import transformers_encoders

    vision = vision_config(row)
    model = transformers_encoders.peer(vision)
    transformers_encoders.publish(model, folder, transformers_encoders.HUB.get(row))
    side = vision.image_size
    pixels = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    start = time.perf_counter()
    found = transformers_encoders.levels(model, vision, torch.from_numpy(pixels))
    seconds = time.perf_counter() - start
    np.savez(folder / "features.npz", pixels=pixels, **{level: tensor.numpy() for level, tensor in found.items()})
    return seconds


def _compare(framework: str, folder: Path) -> tuple[float, int, float, dict[str, float]]:
    """Seconds and peak memory of loading, seconds of one image, and for each level the largest error over the largest value."""
    package = importlib.import_module(PACKAGES[framework])
    start = time.perf_counter()
    with Peak() as peak:
        encoder = package.load_encoder(folder, device="cpu")
    loading = time.perf_counter() - start
    stored = np.load(folder / "features.npz")
    errors, seconds = {}, 0.0
    for level in stored.files[1:]:
        start = time.perf_counter()
        ours = _features(framework, encoder, stored["pixels"], level)
        seconds = seconds or time.perf_counter() - start
        errors[level] = float(np.abs(ours - stored[level]).max() / np.abs(stored[level]).max())
    return loading, peak.bytes, seconds, errors


def _features(framework: str, encoder, pixels: np.ndarray, level: str) -> np.ndarray:
    if framework == "torch":
        import torch

        with torch.no_grad():
            return encoder(torch.from_numpy(pixels), level=level).numpy()
    import mindspore

    return encoder(mindspore.Tensor(pixels), level=level).asnumpy()


def encoders(console: Console) -> None:
    """Every encoder row at full size with random weights, float32: both packages against transformers on one image."""
    from tests.transformers_encoders import ROWS  # imported here: it imports PyTorch, which MindSpore's processes must not

    table = Table(title="encoders of full size, random weights, float32, one image: largest error / largest value")
    table.add_column("row", min_width=max(map(len, ROWS)))
    table.add_column("framework")
    for column in ("penultimate", "last", "final", "load, s", "peak / size", "first image, s", "transformers, s"):
        table.add_column(column, justify="right")
    for row in ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            theirs = alone(_publish, row, Path(temporary))
            size = 4 * sum(int(np.prod(shape)) for shape in vision_shapes(vision_config(row).with_all_blocks).values())
            for framework in PACKAGES:
                loading, peak, seconds, errors = alone(_compare, framework, Path(temporary))
                shown = [f"{errors[level]:.1e}" if level in errors else "" for level in ("penultimate", "last", "final")]
                cells = (row, framework, *shown, f"{loading:.1f}", f"{peak / 1e9:.2f} / {size / 1e9:.2f} GB", f"{seconds:.1f}",
                         f"{theirs:.1f}")  # fmt: skip
                console.print(f"[dim]{'  '.join(cells)}[/]", highlight=False)
                table.add_row(*cells)
    console.print(table)


def _write(directory: Path, layout: Layout, config: VisionConfig | LanguageConfig, shapes: Shapes) -> None:
    """Writes random weights in bfloat16 in a publisher's layout."""
    directory.mkdir()
    named = {layout.spellings[0].foreign(name): shape for name, shape in shapes.items()}
    rng, parts = np.random.default_rng(0), (config, None) if isinstance(config, VisionConfig) else (None, config)
    with TensorWriter(directory, "model", named, metadata=dict(layout.metadata), checksums=False) as writer:
        for name, shape in named.items():
            writer.add(name, rng.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16))
        writer.finish()
    (directory / "config.json").write_text(json.dumps(layout.write_config(*parts)))


def _load(framework: str, dtype: str, folder: Path) -> tuple[float, int, int]:
    """Loads encoder and decoder: seconds, peak memory and size of their parameters in bytes."""
    package, arrays = (importlib.import_module(f"{PACKAGES[framework]}{name}") for name in ("", ".arrays"))
    start = time.perf_counter()
    with Peak() as peak:
        encoder = package.load_encoder(folder / "vision", dtype=arrays.DTYPES[dtype], device="cpu")
        decoder = package.load_decoder(folder / "language", dtype=arrays.DTYPES[dtype], device="cpu")
        if framework == "mindspore":
            _parameters(framework, decoder)[-1].asnumpy()  # waits for pending operations
    seconds = time.perf_counter() - start
    size = sum(p.nbytes for module in (encoder, decoder) for p in _parameters(framework, module))
    return seconds, peak.bytes, size


def _parameters(framework: str, module) -> list:
    return list(module.parameters() if framework == "torch" else module.get_parameters())


def load(console: Console) -> None:
    """Memory that loading SigLIP2-So400m and Qwen2.5-1.5B needs in addition (random weights, bfloat16 in the files)."""
    vision, language = vision_config("siglip2-so400m-patch16-512"), language_config("qwen2.5-1.5b")
    table = Table(title=f"loading {vision.name} and {language.name} from bfloat16 files")
    for column in ("framework", "into", "s", "size, GB", "peak memory, GB", "limit (size + 1 GB)"):
        table.add_column(column, justify="left" if column in ("framework", "into") else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(folder / "vision", SIGLIP, vision, vision_shapes(vision.with_all_blocks))
        _write(folder / "language", QWEN2, language, language_shapes(language))
        for framework, dtype in ((f, d) for f in PACKAGES for d in ("bfloat16", "float32")):
            seconds, peak, size = alone(_load, framework, dtype, folder)
            table.add_row(framework, dtype, f"{seconds:.1f}", f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{size / 1e9 + 1:.2f}")
    console.print(table)
