"""Models in local directories, as transformers writes them. Nothing is downloaded, no code of a directory is run, and weights are
read from safetensors alone."""
from pathlib import Path
from typing import Any

from granvit.data.annotate.device import own_device, share_cores

READ = (".json", ".jinja", ".safetensors", ".txt")  # endings of the files that transformers reads
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def model_files(directory: str | Path) -> list[Path]:
    """The files that decide what a model computes, sorted. `ValueError` names a directory that holds no model."""
    directory = Path(directory)
    found = sorted(path for path in directory.glob("*") if path.suffix in READ)
    if not (directory / "config.json").is_file():
        raise ValueError(f"directory {directory}: has no config.json; name a directory that transformers' save_pretrained wrote")
    if not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"directory {directory}: has no .safetensors file; other formats of weights are not read")
    return found


def loaded(auto_class: Any, directory: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained` of a local directory. `ValueError` names the directory if it cannot be loaded."""
    try:
        return auto_class.from_pretrained(str(directory), **LOCAL, **options)
    except Exception as error:  # damaged files raise many types
        raise ValueError(f"directory {directory}: {auto_class.__name__} cannot load it: {error}") from error


def loaded_model(auto_class: Any, directory: str | Path, device: str, dtype: str) -> Any:
    """The model on `own_device(device)`, without dropout and gradients. `dtype` is a name, or "auto" for that of the file."""
    share_cores()
    model = loaded(auto_class, directory, use_safetensors=True, dtype=dtype)
    try:
        return model.to(own_device(device)).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # torch without the device's backend raises either
        raise ValueError(f"device {device}: {error}") from error
