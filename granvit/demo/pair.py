"""The demo's start weights, a small pretrained encoder and decoder in bfloat16: shipped in granvit/demo/pair.

`scripts/demo.py pretrain` makes them (granvit/demo/pretrain.py); the demo starts from them as GranViT starts from SigLIP2 and
Qwen2.5. They are in transformers' layouts of a SigLIP vision tower and of Qwen2. `sha256sum -c SHA256SUMS` checks them, too.
"""
import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
from safetensors.numpy import save_file

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import newest_checkpoint
from granvit.models import LanguageConfig, VisionConfig

SHIPPED = Path(__file__).with_name("pair")
SUMS = "SHA256SUMS"
CARD = "README.md"


def publish_pair(run: Path, vision: VisionConfig, language: LanguageConfig, tokenizer: Path, out: Path) -> None:
    """Writes encoder and decoder of a run's newest checkpoint to `out`/vision and `out`/language, rounded to bfloat16, with
    `SHA256SUMS`. All blocks of the encoder must be built. The projector is left out: stage 1 starts with a random one."""
    _publish(run, SIGLIP, SIGLIP.write_config(vision, None), out / "vision")
    _publish(run, QWEN2, QWEN2.write_config(None, language), out / "language")
    shutil.copy(tokenizer, out / "language" / "tokenizer.json")
    (out / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in _digests(out).items()))


def _publish(run: Path, layout: Layout, config: dict, out: Path) -> None:
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run}: no checkpoint; `python scripts/demo.py pretrain` makes it")
    names = ((layout.spellings[0].foreign(name), array) for name, array in checkpoint.tensors("model"))
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in names if name}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata=dict(layout.metadata))
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}, indent=1))


def _digests(pair: Path) -> dict[str, str]:
    """File name relative to `pair` -> SHA-256, for all files but the sums and the card."""
    files = sorted(path for path in pair.rglob("*") if path.is_file() and path.name not in (SUMS, CARD))
    return {path.relative_to(pair).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_sums(pair: Path) -> dict[str, str]:
    """The contents of `SHA256SUMS`: file name -> digest. `ValueError` if the file is missing or not in that format."""
    try:
        lines = (pair / SUMS).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{pair / SUMS}: missing or damaged; get it again with the checkout or the package") from None


def check_pair(pair: Path) -> None:
    """`ValueError` names the first file that is missing, added or changed since `SHA256SUMS` was written."""
    expected, found = read_sums(pair), _digests(pair)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            state = "missing" if name not in found else "not listed in" if name not in expected else "not the file of"
            raise ValueError(f"{pair / name}: {state} {pair / SUMS}; get it again with the checkout or the package")


def copy_pair(out: Path, pair: Path = SHIPPED) -> None:
    """Checks the shipped pair and copies it to `out`, which is replaced."""
    check_pair(pair)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(pair, out)
