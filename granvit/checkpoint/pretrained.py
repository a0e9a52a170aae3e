"""Weights from outside: where a run's start from (a seed, publishers' directories, another run), and models by themselves."""
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    """Every parameter of `parameter_shapes` with its start value, one at a time, in the precision it is stored in.

    `model.init_from` takes all parts from another run's newest checkpoint, or, where that has another decoder, the encoder
    alone (refused where that run trained a projector alone: nothing of its training would be kept); for the rest `model.init`
    chooses between the seeded initialisation and the publishers' files, beside which the projector is the seeded one. `origin` is
    the checkpoint of `model.init_from` where it was chosen before (default: its newest). Directories and names are checked before
    the first tensor is read: `ValueError` names what is missing, unknown or of another shape.
    """
    if config.model.init_from is not None:
        return _from_run(config, vision, language, origin)
    if config.model.init == "random":
        return _seeded(parameter_shapes(vision, language), config.seed)
    encoder = _published("model.weights_vision", config.model.weights_vision, vision, vision_shapes(vision))
    return _chained(encoder, _new_projector_and_decoder(config, vision, language))


def _without(config: RunConfig) -> str:
    """What a run starts from where it names no other."""
    if config.model.init == "random":
        return "from random weights"
    encoder, decoder = config.model.weights_vision, config.model.weights_language
    return f"from {encoder}, {decoder} and a projector of random numbers"


def _new_projector_and_decoder(config: RunConfig, vision: VisionConfig, language: LanguageConfig) -> Tensors:
    projector = _seeded(projector_shapes(vision, language), config.seed)
    if config.model.init == "random":
        return _chained(projector, _seeded(language_shapes(language), config.seed))
    key = "model.weights_language"
    return _chained(projector, _published(key, config.model.weights_language, language, language_shapes(language)))


def _chained(*streams: Tensors) -> Tensors:
    for stream in streams:
        yield from stream


def _seeded(shapes: Shapes, seed: int) -> Tensors:
    return ((name, initial_value(name, shape, seed)) for name, shape in shapes.items())


def _above(vision: VisionConfig) -> set[str]:
    """Names of the encoder's blocks above the highest level that this configuration builds: stated, known, not used."""
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
            f"model.init_from {run}: no checkpoint in {run / 'checkpoints'} (looked for in {Path.cwd()}); {make}. {without}"
        )
    same = checkpoint.language.is_built_like(language)
    theirs, ours = checkpoint.language, language
    if not same and checkpoint.config.stage_spec.trains == {"projector"}:
        raise ValueError(
            f"model.init_from {checkpoint.path}: its decoder is {theirs.name!r} of width {theirs.width} and {theirs.layers} "
            f"layers, this run's {ours.name!r} of width {ours.width} and {ours.layers} layers, so that nothing it trained fits "
            f"here; train it with model.language={config.model.language}. {without}"
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
    return _chained(taken, _new_projector_and_decoder(config, vision, language))


def _published(key: str, directory: str, ours: VisionConfig | LanguageConfig, expected: Shapes) -> Tensors:
    """The tensors of a publisher's directory under canonical names."""
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
    belongs = "config.json, model.safetensors (or model.safetensors.index.json with its parts)"
    belongs += " and tokenizer.json" if tokenizer else ""
    if not folder.is_dir():
        raise ValueError(f"{key}: no directory {folder} (looked for in {Path.cwd()}); {belongs} belong there. {INSTEAD}")
    if not (folder / "config.json").exists():
        raise ValueError(f"{key}: no config.json in {folder}; {belongs} belong there. {INSTEAD}")
    return read_json(folder / "config.json")


@dataclass(frozen=True)
class Opened:
    """Parts of a model in files: their configurations, and their tensors, none of which is read before its turn.

    `dtype` is the one that all tensors are stored in, float32 where they differ.
    """

    path: Path
    vision: VisionConfig | None
    language: LanguageConfig | None
    dtype: str
    tensors: Tensors


def open_pretrained(directory: str | Path, *parts: str) -> Opened:
    """Opens these parts of the model in a publisher's directory of any known layout, in a run's or in one of
    `write_pretrained`; what else is there is named in a warning.

    `ValueError` names file and tensor, or the key of config.json, where it is none of these or a part is not there.
    """
    path = Path(directory)
    source, layout, contents = open_contents(path)
    missing = set(parts) - {part_of(name) for name in contents.names}
    if missing:
        raise ValueError(f"{path}: holds no {' and no '.join(sorted(missing))} (its layout is {layout.name!r})")
    if not contents.stated:
        raise ValueError(f"{path}: no config.json says what model this is (how many heads, say): put the publisher's there")
    other = {n: f"of the {part_of(c)}, which was not asked for" for c, n in contents.names.items() if part_of(c) not in parts}
    for line in left_out_lines(contents.left_out | other):
        log.warning(f"{path}: {line}")
    names = {canonical: name for canonical, name in contents.names.items() if part_of(canonical) in parts}
    stored = {source.tensors.dtypes[source.tensors.entries[name]["tag"]].name for name in names.values()}
    tensors = ((canonical, source.tensors.read(name)) for canonical, name in names.items())
    return Opened(path, contents.vision, contents.language, stored.pop() if len(stored) == 1 else "float32", tensors)


def write_pretrained(directory: str | Path, vision: VisionConfig | None, language: LanguageConfig | None, shapes: Shapes,
                     tensors: Iterable[tuple[str, np.ndarray]]) -> None:  # fmt: skip
    """Writes parts of a model in the default layout: config.json and model.safetensors (in parts where it is large).

    What a directory holds under these names is replaced once all is written; nothing else in it is touched.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory) as folder:
        write_set(Path(folder), "model", shapes, tensors)
        write_synced(Path(folder) / "config.json", json.dumps(DEFAULT.write_config(vision, language), indent=2) + "\n")
        new = sorted(os.listdir(folder), key=lambda name: name == "config.json")  # it comes last
        for name in new:
            os.replace(Path(folder) / name, directory / name)
        for old in directory.iterdir():
            if OUR_FILES.fullmatch(old.name) and old.name not in new:
                old.unlink()
    sync_directory(directory)
