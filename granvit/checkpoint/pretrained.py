"""Start weights of a run (from a seed, publishers' directories or another run), and reading and writing parts of a model."""
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from granvit.checkpoint.contents import left_out_lines, open_contents
from granvit.checkpoint.detect import LAYOUTS
from granvit.checkpoint.layouts.default import DEFAULT
from granvit.checkpoint.run import Checkpoint, newest_checkpoint
from granvit.checkpoint.source import read_json
from granvit.checkpoint.tensors import shape_differences, sync_directory, write_set, write_synced
from granvit.config import RunConfig
from granvit.init import initial_value
from granvit.models import (
    PARTS,
    LanguageConfig,
    Shapes,
    VisionConfig,
    language_shapes,
    parameter_shapes,
    part_of,
    projector_shapes,
    vision_shapes,
)
from granvit.stages import STAGES

log = logging.getLogger("granvit")
INSTEAD = "model.init=random runs without published weights"
OUR_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|model\.sha256\.json")
Tensors = Iterator[tuple[str, np.ndarray]]


def start_weights(config: RunConfig, vision: VisionConfig, language: LanguageConfig, origin: Checkpoint | None = None) -> Tensors:
    """Yields the start value of every parameter of `parameter_shapes`, one at a time, in the dtype that it is stored in.

    With `model.init_from` all parts come from another run's newest checkpoint (or from `origin`). If that has another decoder,
    only its encoder is used; this is an error if that run trained only a projector, because nothing it trained would be used.
    Other parts come from `model.init`: random values from the seed, or publishers' files and a random projector. Directories and
    names are checked before the first tensor is read: `ValueError` names what is missing, unknown or of another shape.
    """
    if config.model.init_from is not None:
        return _from_run(config, vision, language, origin)
    if config.model.init == "random":
        return _seeded(parameter_shapes(vision, language), config.seed)
    encoder = _published("model.weights_vision", config.model.weights_vision, vision, vision_shapes(vision))
    return chain(encoder, _new_projector_and_decoder(config, vision, language))


def _without(config: RunConfig) -> str:
    """Describes what a run starts from without `model.init_from`."""
    if config.model.init == "random":
        return "from random weights"
    encoder, decoder = config.model.weights_vision, config.model.weights_language
    return f"from {encoder}, {decoder} and a random projector"


def _new_projector_and_decoder(config: RunConfig, vision: VisionConfig, language: LanguageConfig) -> Tensors:
    projector = _seeded(projector_shapes(vision, language), config.seed)
    if config.model.init == "random":
        return chain(projector, _seeded(language_shapes(language), config.seed))
    key = "model.weights_language"
    return chain(projector, _published(key, config.model.weights_language, language, language_shapes(language)))


def _seeded(shapes: Shapes, seed: int) -> Tensors:
    return ((name, initial_value(name, shape, seed)) for name, shape in shapes.items())


def _above(vision: VisionConfig) -> set[str]:
    """Names of the encoder's parameters in blocks that this configuration does not build: other files may have them."""
    return vision_shapes(vision.with_all_blocks).keys() - vision_shapes(vision).keys()


def _from_run(config: RunConfig, vision: VisionConfig, language: LanguageConfig, origin: Checkpoint | None) -> Tensors:
    assert config.model.init_from is not None
    run = Path(config.model.init_from)
    checkpoint = origin or newest_checkpoint(run)
    without = f"model.init_from=null starts without it, {_without(config)}"
    if checkpoint is None:
        before = STAGES[config.stage].after
        make = f"scripts/{before}.py makes it, with the --config that has this output" if before else "run that stage first"
        raise ValueError(
            f"model.init_from {run}: no checkpoint in {run / 'checkpoints'} (current directory: {Path.cwd()}); {make}. {without}"
        )
    same = checkpoint.language.is_built_like(language)
    theirs, ours = checkpoint.language, language
    if not same and checkpoint.config.stage_spec.trains == {"projector"}:
        raise ValueError(
            f"model.init_from {checkpoint.path}: its decoder is {theirs.name!r} of width {theirs.width} and {theirs.layers} "
            f"layers, this run's {ours.name!r} of width {ours.width} and {ours.layers} layers, so its projector does not "
            f"fit; train it with model.language={config.model.language}. {without}"
        )
    parts = PARTS if same else ("vision",)
    unused = _above(vision)
    found = {n: shape for n, shape in checkpoint.shapes("model").items() if part_of(n) in parts and n not in unused}
    expected = {name: shape for name, shape in parameter_shapes(vision, language).items() if part_of(name) in parts}
    wrong = shape_differences(found, expected)
    if wrong:
        raise ValueError(
            f"model.init_from {checkpoint.path}: of another architecture (its encoder is {checkpoint.vision.name!r}, this run's "
            f"{vision.name!r}): {'; '.join(wrong)}; train that run with this one's model.vision, model.language and "
            f"vision.tiling. {without}"
        )
    taken = ((name, array) for name, array in checkpoint.tensors("model") if name in expected)
    if same:
        if config.model.init != "random" and config.model.weights_language != checkpoint.config.model.weights_language:
            named = config.model.weights_language
            log.warning(f"model.weights_language {named} gives the tokenizer alone: the decoder is that of {checkpoint.path}")
        return taken
    decoder = "random" if config.model.init == "random" else f"from {config.model.weights_language}"
    log.warning(
        f"model.init_from {checkpoint.path}: its decoder is {checkpoint.language.name!r}, this run's {language.name!r}: "
        f"the encoder is kept, the projector is new, the decoder is {decoder}. To train the projector first: "
        f"scripts/projector.py model.language={config.model.language} model.init_from={run} output=OTHER, then "
        f"model.init_from=OTHER here"
    )
    return chain(taken, _new_projector_and_decoder(config, vision, language))


def _published(key: str, directory: str, ours: VisionConfig | LanguageConfig, expected: Shapes) -> Tensors:
    """One part from a publisher's directory: yields its tensors under canonical names.

    `ValueError` if the directory is incomplete or has another model than `ours`.
    """
    folder = Path(directory)
    part = "vision" if isinstance(ours, VisionConfig) else "language"
    tree = _read_config_json(key, folder, tokenizer=part == "language")
    layouts = [layout for layout in LAYOUTS.values() if part in layout.parts and tree.get("model_type") in layout.model_types]
    if not layouts:
        known = dict.fromkeys(t for layout in LAYOUTS.values() if part in layout.parts for t in layout.model_types)
        raise ValueError(f"{folder / 'config.json'}: model_type {tree.get('model_type')!r}; {key} takes {', '.join(known)}")
    try:
        layouts[0].check_config(tree, ours, str(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: no key {error.args[0]!r}") from None
    source, _, contents = open_contents(folder)
    unused = _above(ours) if isinstance(ours, VisionConfig) else set()
    names = {n: foreign for n, foreign in contents.names.items() if part_of(n) == part and n not in unused}
    wrong = shape_differences({n: source.tensors.shapes[foreign] for n, foreign in names.items()}, expected)
    if wrong:
        raise ValueError(f"{folder} does not hold a {ours.name}: " + "; ".join(wrong))
    return ((name, source.tensors.read(names[name])) for name in expected)


def _read_config_json(key: str, folder: Path, tokenizer: bool) -> dict[str, Any]:
    belongs = "config.json, model.safetensors (or model.safetensors.index.json with its files)"
    belongs += " and tokenizer.json" if tokenizer else ""
    if not folder.is_dir():
        raise ValueError(f"{key}: no directory {folder} (current directory: {Path.cwd()}); {belongs} belong there. {INSTEAD}")
    if not (folder / "config.json").exists():
        raise ValueError(f"{key}: no config.json in {folder}; {belongs} belong there. {INSTEAD}")
    return read_json(folder / "config.json")


@dataclass(frozen=True)
class Opened:
    """Parts of a model in files: their configurations, and an iterator that reads their tensors one at a time.

    `dtype` is the dtype that all tensors are stored in, float32 if they differ.
    """

    path: Path
    vision: VisionConfig | None
    language: LanguageConfig | None
    dtype: str
    tensors: Tensors


def open_pretrained(directory: str | Path, *parts: str) -> Opened:
    """Opens `parts` of the model in a publisher's directory of any known layout, a run's directory, or one written by
    `write_pretrained`. A warning names tensors that are not used.

    `ValueError` names the file and tensor, or the key of config.json, that is invalid, or a part that is missing.
    """
    path = Path(directory)
    source, layout, contents = open_contents(path)
    missing = set(parts) - {part_of(name) for name in contents.names}
    if missing:
        raise ValueError(f"{path}: holds no {' and no '.join(sorted(missing))} (its layout is {layout.name!r})")
    if not contents.stated:
        raise ValueError(f"{path}: no config.json describes this model (the number of heads, for example): add the publisher's")
    other = {n: f"of the {part_of(c)}, which was not requested" for c, n in contents.names.items() if part_of(c) not in parts}
    for line in left_out_lines(contents.left_out | other):
        log.warning(f"{path}: {line}")
    names = {canonical: name for canonical, name in contents.names.items() if part_of(canonical) in parts}
    stored = {source.tensors.dtype(name).name for name in names.values()}
    tensors = ((canonical, source.tensors.read(name)) for canonical, name in names.items())
    return Opened(path, contents.vision, contents.language, stored.pop() if len(stored) == 1 else "float32", tensors)


def write_pretrained(directory: str | Path, vision: VisionConfig | None, language: LanguageConfig | None, shapes: Shapes,
                     tensors: Iterable[tuple[str, np.ndarray]]) -> None:  # fmt: skip
    """Writes parts of a model in the default layout: config.json and model.safetensors (several files if it is large).

    Files of these names in the directory are replaced once everything is written; other files are not changed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory) as folder:
        write_set(Path(folder), "model", shapes, tensors)
        write_synced(Path(folder) / "config.json", json.dumps(DEFAULT.write_config(vision, language), indent=2) + "\n")
        new = sorted(os.listdir(folder), key=lambda name: name == "config.json")  # config.json last
        for name in new:
            os.replace(Path(folder) / name, directory / name)
        for old in directory.iterdir():
            if OUR_FILES.fullmatch(old.name) and old.name not in new:
                old.unlink()
    sync_directory(directory)
