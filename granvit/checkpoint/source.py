"""Opens the source of a conversion: a publisher's directory, a run's checkpoint or one file. No tensor is read."""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.checkpoint.layouts.mindspore import CkptFile
from granvit.checkpoint.run import newest_checkpoint, open_checkpoint
from granvit.checkpoint.tensors import JoinedTensors, StoredTensors, TensorSet
from granvit.models import LanguageConfig, VisionConfig

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle")
NO_PICKLE = (
    "is a pickle, which is not read: unpickling runs the code in it. Use the publisher's safetensors files; if there are none, "
    "transformers can write them: MODEL.from_pretrained(DIRECTORY).save_pretrained(OUT)"
)


@dataclass
class Source:
    """Tensors under foreign names, and the description of the model: a config.json (`tree`), or the configuration of a run.

    `beside`: the source is one file, and config.json is in the same directory; it may belong to another file.
    """

    path: Path
    tensors: StoredTensors
    tree: dict[str, Any] | None = None
    config_path: Path | None = None
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    beside: bool = False


def open_source(path: Path) -> Source:
    """Opens the file or directory `path`; `ValueError` if it is neither a checkpoint nor a file of tensors that is known here."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        return _open_directory(path)
    _refuse_pickle(path)
    config = path.parent / "config.json"
    found = _open_file(path)
    return Source(path, found, read_json(config) if config.exists() else None, config, beside=True)


def _refuse_pickle(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    zipped, pickled = start == b"PK\x03\x04", start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if path.suffix in PICKLED or (path.suffix != ".safetensors" and (zipped or pickled)):
        raise ValueError(f"{path}: {NO_PICKLE}")


def _open_file(path: Path) -> StoredTensors:
    if path.suffix == ".ckpt":
        return CkptFile(path)
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path.name):
        raise ValueError(f"{path} is one of several files of a model: name the directory")
    if path.suffix == ".safetensors":
        return TensorSet(path.parent, path.stem)
    raise ValueError(f"{path}: expected a directory, a .safetensors file or a .ckpt file")


def _open_directory(path: Path) -> Source:
    if (path / "state.json").exists() or (path / "checkpoints").is_dir():
        return _open_run(path)
    config = path / "config.json"
    tree = read_json(config) if config.exists() else None
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists() and single.exists():
        raise ValueError(f"{path}: both {index.name} and {single.name} are there; name one of the two files, or remove one")
    if index.exists() or single.exists():
        checked = (path / "model.sha256.json").exists()
        return Source(path, TensorSet(path, checked=checked), tree, config)
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".ckpt"))
    if len(files) == 1:
        _refuse_pickle(files[0])
        return Source(path, _open_file(files[0]), tree, config)
    if files:
        names = ", ".join(p.name for p in files[:4])
        raise ValueError(f"{path}: several files ({names}) and no {index.name}: name one file, or restore the index")
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLED)
    if pickles:
        raise ValueError(f"{pickles[0]}: {NO_PICKLE}")
    raise ValueError(f"{path}: neither {single.name}, {index.name}, a .ckpt file nor a run's checkpoint is there")


def _open_run(path: Path) -> Source:
    checkpoint = open_checkpoint(path) if (path / "state.json").exists() else newest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path / 'checkpoints'}: no checkpoint is there")
    return Source(checkpoint.path, JoinedTensors(checkpoint.members()), None, None, checkpoint.vision, checkpoint.language)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; `ValueError` names the file if it does not contain one."""
    try:
        tree = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree
