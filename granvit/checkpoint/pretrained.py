"""Where a run's weights start from: a seed, publishers' directories, or another run."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import newest_checkpoint
from granvit.checkpoint.tensors import TensorSet, shape_differences
from granvit.config import RunConfig
from granvit.init import initial_value
from granvit.models import (
    LanguageConfig,
    Shapes,
    VisionConfig,
    language_shapes,
    parameter_shapes,
    projector_shapes,
    vision_shapes,
)

VISION_LAYOUTS = (SIGLIP,)
LANGUAGE_LAYOUTS = (QWEN2, LLAMA)
INSTEAD = "model.init=random runs without"


def start_weights(config: RunConfig, vision: VisionConfig, language: LanguageConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of `parameter_shapes` with its start value, one at a time, in the precision it is stored in.

    `model.init_from` takes all parts from another run's newest checkpoint; otherwise `model.init` chooses between the seeded
    initialisation and the publishers' files, whose projector is the seeded one. Directories and names are checked before
    the first tensor is read: `ValueError` names what is missing, unknown or of another shape.
    """
    if config.model.init_from is not None:
        return _from_run(Path(config.model.init_from), vision, language)
    if config.model.init == "random":
        return _seeded(parameter_shapes(vision, language), config.seed)
    encoder = _published("model.weights_vision", config.model.weights_vision, VISION_LAYOUTS, vision, vision_shapes(vision))
    decoder = _published(
        "model.weights_language", config.model.weights_language, LANGUAGE_LAYOUTS, language, language_shapes(language)
    )
    return _chained(encoder, _seeded(projector_shapes(vision, language), config.seed), decoder)


def _chained(*streams: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    for stream in streams:
        yield from stream


def _seeded(shapes: Shapes, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, initial_value(name, shape, seed)) for name, shape in shapes.items())


def _above(vision: VisionConfig) -> set[str]:
    """Names of the encoder's blocks above the highest level that this configuration builds: stated, known, not used."""
    top = "final" if vision.closing_norm else "last"
    return vision_shapes(VisionConfig(**{**vision.model_dump(), "top": top})).keys() - vision_shapes(vision).keys()


def _from_run(run: Path, vision: VisionConfig, language: LanguageConfig) -> Iterator[tuple[str, np.ndarray]]:
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"model.init_from {run}: no checkpoint in {run / 'checkpoints'}; run that stage first")
    unused = _above(vision)
    found = {name: shape for name, shape in checkpoint.shapes("model").items() if name not in unused}
    wrong = shape_differences(found, parameter_shapes(vision, language))
    if wrong:
        raise ValueError(f"model.init_from {checkpoint.path}: of another architecture: " + "; ".join(wrong))
    return ((name, array) for name, array in checkpoint.tensors("model") if name not in unused)


def _published(
    key: str, directory: str, layouts: tuple[Layout, ...], ours: VisionConfig | LanguageConfig, expected: Shapes
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a publisher's directory under canonical names."""
    folder = Path(directory)
    tree = _read_config_json(key, folder, tokenizer=isinstance(ours, LanguageConfig))
    by_type = {model_type: layout for layout in layouts for model_type in layout.model_types}
    layout = by_type.get(tree.get("model_type"))
    if layout is None:
        raise ValueError(f"{folder / 'config.json'}: model_type {tree.get('model_type')!r}; {key} takes {', '.join(by_type)}")
    try:
        layout.check_config(tree, ours, str(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: no key {error.args[0]!r}") from None
    tensors = TensorSet(folder)
    foreign_names: dict[str, str] = {}
    unused = _above(ours) if isinstance(ours, VisionConfig) else {"language.lm_head.weight"} if ours.tied_head else set()
    for foreign in tensors.shapes:
        try:
            canonical = layout.canonical(foreign)
        except ValueError as error:
            raise ValueError(f"{tensors.entries[foreign]['path']}: {error}") from None
        if canonical is not None and canonical not in unused:
            foreign_names[canonical] = foreign
    found = {canonical: tensors.shapes[foreign] for canonical, foreign in foreign_names.items()}
    wrong = shape_differences(found, expected)
    if wrong:
        raise ValueError(f"{folder} does not hold a {ours.name}: " + "; ".join(wrong))
    return ((name, tensors.read(foreign_names[name])) for name in expected)


def _read_config_json(key: str, folder: Path, tokenizer: bool) -> dict[str, Any]:
    belongs = "config.json, model.safetensors (or model.safetensors.index.json with its parts)"
    belongs += " and tokenizer.json" if tokenizer else ""
    if not folder.is_dir():
        raise ValueError(f"{key}: no directory {folder} (looked for in {Path.cwd()}); {belongs} belong there. {INSTEAD}")
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{key}: no config.json in {folder}; {belongs} belong there. {INSTEAD}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree
