"""What a run's result depends on besides its configuration: published weights, tokenizer, the run that it starts from, stores."""
import hashlib
from functools import cache
from pathlib import Path

from granvit.checkpoint.run import newest_checkpoint
from granvit.config import RunConfig
from granvit.data.store import Store

READ = (".json", ".safetensors")  # the files of a publisher's directory that are read


def start_files(config: RunConfig, first: bool) -> str:
    """One line for each start file and store, with a hash of its contents.

    `first`: the run does not continue another run of its chain. `ValueError` names a directory, checkpoint or store that the run
    needs and that is missing or damaged. Files are not opened as models here: the run itself does that.
    """
    model, lines = config.model, []
    if first and model.init_from is not None:
        checkpoint = newest_checkpoint(model.init_from)
        if checkpoint is None:
            raise ValueError(f"model.init_from {model.init_from}: no checkpoint there")
        lines.append(f"init_from {checkpoint.digest}")
    if first and model.init_from is None and model.init == "pretrained":
        lines += [f"vision {line}" for line in _directory("model.weights_vision", model.weights_vision)]
    if model.init == "pretrained" or Path(model.weights_language).is_dir():
        lines += [f"language {line}" for line in _directory("model.weights_language", model.weights_language)]
    if model.tokenizer is not None:
        if not Path(model.tokenizer).exists():
            raise ValueError(f"model.tokenizer: no file {model.tokenizer}")
        path = Path(model.tokenizer)
        lines += [f"tokenizer {line}" for line in (_directory("model.tokenizer", str(path)) if path.is_dir() else [_file(path)])]
    stores = [source.path for source in config.data.sources] + ([] if config.eval.source is None else [config.eval.source])
    lines += [f"store {Store(path, check=False).fingerprint}" for path in stores]
    return "\n".join(lines)


def _directory(key: str, directory: str) -> list[str]:
    """A line for each file of a publisher's directory."""
    folder = Path(directory)
    files = sorted(path for path in folder.iterdir() if path.suffix in READ) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{key}: no weights in {folder}")
    return [_file(path) for path in files]


def _file(path: Path) -> str:
    state = path.stat()
    return f"{path.name} {_digest(path, state.st_mtime_ns, state.st_size)}"


@cache
def _digest(path: Path, changed: int, size: int) -> str:
    """SHA-256 of a file. `changed` and `size` are part of the cache's key."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
