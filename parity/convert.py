"""Converts checkpoints between the default (canonical) layout and those of other programs, tensor by tensor.

    python parity/convert.py SRC DST --to LAYOUT [--from LAYOUT] [--no-verify]

SRC is a publisher's directory, a run's directory or one of its checkpoints (RUN/checkpoints/step_0001000), or one .safetensors or
.ckpt file. DST must not exist: a name that ends in .safetensors or .ckpt becomes one file, any other a directory with a
config.json beside the tensors. Tokenizers and preprocessing files are not copied.

layouts:
  default      this project's own names; any of its parts
  siglip       SigLIP and SigLIP2 of transformers: the encoder (a text tower in SRC is left out)
  clip         CLIP of transformers: the encoder (a text tower in SRC is left out)
  qwen2        Qwen2 and Qwen2.5 of transformers: the decoder
  llama        Llama of transformers: the decoder
  llava        LlavaForConditionalGeneration of transformers: encoder, projector and decoder
  mindformers  Llama and Qwen2 of MindFormers: the decoder, a .ckpt file
  mindspore    this project's own names in a .ckpt file

Every tensor keeps its bytes and its dtype. What SRC holds beyond the layout is listed with the reason; anything that is not
explained is an error. Exit status: 0 done, 2 refused (DST is not created).
"""
import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from granvit.checkpoint.layouts import Layout, Spelling
from granvit.checkpoint.layouts.clip import CLIP
from granvit.checkpoint.layouts.default import DEFAULT
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.llava import LLAVA
from granvit.checkpoint.layouts.mindformers import MINDFORMERS
from granvit.checkpoint.layouts.mindspore import MINDSPORE, CkptFile, CkptWriter
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import newest_checkpoint, open_checkpoint, open_part
from granvit.checkpoint.tensors import (
    SHARD_BYTES,
    StoredTensors,
    TensorSet,
    TensorWriter,
    shape_differences,
    sync_directory,
    write_synced,
)
from granvit.models import (
    PARTS,
    LanguageConfig,
    Shapes,
    VisionConfig,
    language_shapes,
    part_of,
    projector_shapes,
    vision_shapes,
)

LAYOUTS = {layout.name: layout for layout in (DEFAULT, SIGLIP, CLIP, QWEN2, LLAMA, LLAVA, MINDFORMERS, MINDSPORE)}
DETECTED = tuple(layout for layout in LAYOUTS.values() if layout is not MINDSPORE)  # which differs from DEFAULT by its file alone
OURS = ("default", "mindspore")  # these hold any parts of the model
IN_CKPT = ("mindformers", "mindspore")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle")
NO_PICKLE = "is a pickle, and reading one runs the code in it: nothing is unpickled here. Take the publisher's safetensors files"
EXAMPLES = """examples:
  python parity/convert.py models/siglip2-so400m-patch16-512 siglip2-default --to default
  python parity/convert.py runs/stage2 granvit-llava --to llava           # the newest checkpoint of a run
  python parity/convert.py runs/stage2/checkpoints/step_0001000 decoder --to qwen2
  python parity/convert.py models/Qwen2.5-1.5B-Instruct qwen.ckpt --to mindformers
  python parity/convert.py qwen.ckpt qwen-default --to default --from mindformers"""

EMBEDDING, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"
ProgressCallback = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


@dataclass
class Report:
    """What was converted. `left_out` maps names in the source to reasons, `filled` lists names that only the target has."""

    source: Path
    destination: Path
    from_layout: str
    to_layout: str
    tensors: int = 0
    bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Source:
    """Tensors under foreign names and what is known of the model: a config.json (`tree`), or a run's own configuration.

    `beside` says that config.json only lies beside the one file that was named: it may belong to another.
    """

    path: Path
    tensors: StoredTensors
    tree: dict[str, Any] | None = None
    config_path: Path | None = None
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    beside: bool = False


class RunTensors(StoredTensors):
    """The model in a run's checkpoint: its own file and the frozen parts that it refers to, checked as they are read."""

    def __init__(self, sets: Sequence[TensorSet]):
        self.owner: dict[str, TensorSet] = {}
        self.entries = {}
        for tensors in sets:
            for name, entry in tensors.entries.items():
                if name in self.entries:
                    raise ValueError(f"{entry['path']}: tensor {name!r} is also in {self.entries[name]['path']}")
                self.owner[name], self.entries[name] = tensors, entry

    def read(self, name: str) -> np.ndarray:
        return self.owner[name].read(name)


def open_source(path: Path) -> Source:
    """Opens what is at `path`; `ValueError` says what was expected there."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        return _open_directory(path)
    _refuse_pickle(path)
    config = path.parent / "config.json"
    found = _open_file(path)
    return Source(path, found, _read_json(config) if config.exists() else None, config, beside=True)


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
        raise ValueError(f"{path} is one of several files: name their directory")
    if path.suffix == ".safetensors":
        return TensorSet(path.parent, path.stem)
    raise ValueError(f"{path}: expected a directory, a .safetensors file or a .ckpt file")


def _open_directory(path: Path) -> Source:
    if (path / "state.json").exists() or (path / "checkpoints").is_dir():
        return _open_run(path)
    config = path / "config.json"
    tree = _read_json(config) if config.exists() else None
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists() and single.exists():
        raise ValueError(f"{path}: both {index.name} and {single.name} are there; name the one file, or move it away")
    if index.exists() or single.exists():
        checked = (path / "model.sha256.json").exists()
        return Source(path, TensorSet(path, checked=checked), tree, config)
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".ckpt"))
    if len(files) == 1:
        _refuse_pickle(files[0])
        return Source(path, _open_file(files[0]), tree, config)
    if files:
        names = ", ".join(p.name for p in files[:4])
        raise ValueError(f"{path}: several files ({names}) and no {index.name}: name the one file, or restore the index")
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLED)
    if pickles:
        raise ValueError(f"{pickles[0]}: {NO_PICKLE}")
    raise ValueError(f"{path}: neither {single.name}, {index.name}, a .ckpt file nor a run's checkpoint is there")


def _open_run(path: Path) -> Source:
    checkpoint = open_checkpoint(path) if (path / "state.json").exists() else newest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path / 'checkpoints'}: no checkpoint is there")
    sets = [TensorSet(checkpoint.path, checked=True)] if any(p.trained for p in checkpoint.parts.values()) else []
    frozen = {name: part.hash for name, part in checkpoint.parts.items() if not part.trained}
    sets += [open_part(checkpoint.path.parents[1], name, digest) for name, digest in frozen.items()]
    return Source(checkpoint.path, RunTensors(sets), None, None, checkpoint.vision, checkpoint.language)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree


def detect(source: Source, named: str | None) -> tuple[Layout, Spelling]:
    """The source's layout, by its config.json and its names; `ValueError` where that does not decide, or a name is unknown."""
    if source.vision is not None:  # a run's checkpoint
        if named not in (None, DEFAULT.name):
            raise ValueError(f"{source.path}: a run's checkpoint has the layout {DEFAULT.name!r}, not {named!r}")
        return DEFAULT, DEFAULT.spellings[0]
    names = list(source.tensors.shapes)
    if named is not None:
        layout = _layout(named)
        return layout, _best_spelling(source, layout, names)
    stated = _by_model_type(source)
    fitting = [layout for layout in (stated or DETECTED) if any(_explains(layout, s, names) for s in layout.spellings)]
    if len(fitting) > 1:
        candidates = ", ".join(layout.name for layout in fitting)
        raise ValueError(f"{source.path}: its names fit several layouts ({candidates}); name one with --from")
    # Where none fits, the nearest one names the tensor that is in the way.
    layout = fitting[0] if fitting else max(stated or DETECTED, key=lambda layout: _mapped(layout, names))
    if not fitting and not _mapped(layout, names):
        at = source.tensors.entries[names[0]]["path"] if names else source.path
        what = f"tensor {names[0]!r} is in no known layout" if names else "no tensor is there"
        raise ValueError(f"{at}: {what} ({', '.join(layout.name for layout in stated or DETECTED)})")
    return layout, _best_spelling(source, layout, names)


def _by_model_type(source: Source) -> tuple[Layout, ...]:
    """The layouts that config.json names; none where there is no config.json."""
    if source.tree is None or (source.beside and "model_type" not in source.tree):
        return ()
    model_type = source.tree.get("model_type")
    found = tuple(layout for layout in DETECTED if model_type in layout.model_types)
    if not found and not source.beside:
        known = ", ".join(dict.fromkeys(t for layout in DETECTED for t in layout.model_types))
        raise ValueError(f"{source.config_path}: model_type {model_type!r}; known: {known}. --from names one that fits")
    if source.beside:  # it may belong to another file: it decides only where it agrees
        names = list(source.tensors.shapes)
        found = tuple(layout for layout in found if any(_explains(layout, s, names) for s in layout.spellings))
    return found


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is not known; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _explains(layout: Layout, spelling: Spelling, names: Sequence[str]) -> bool:
    mapped = [(name, spelling.canonical(name)) for name in names]
    if not any(canonical for _, canonical in mapped):
        return False
    if any(canonical is None and spelling.reason(name) is None for name, canonical in mapped):
        return False
    return not _unpaired(layout, [canonical for _, canonical in mapped if canonical])


def _unpaired(layout: Layout, canonicals: Sequence[str]) -> bool:
    """Whether a first name of the layout's pairs is there without its second."""
    there = set(canonicals)
    for first, second in layout.pairs:
        pairing = Spelling(((second, first),))
        if any((partner := pairing.foreign(name)) is not None and partner not in there for name in there):
            return True
    return False


def _mapped(layout: Layout, names: Sequence[str]) -> int:
    return max(sum(spelling.canonical(name) is not None for name in names) for spelling in layout.spellings)


def _best_spelling(source: Source, layout: Layout, names: Sequence[str]) -> Spelling:
    """The spelling that maps most; `ValueError` naming the first tensor that it does not know."""
    spelling = max(layout.spellings, key=lambda s: sum(s.canonical(name) is not None for name in names))
    for name in names:
        if spelling.canonical(name) is not None or spelling.reason(name) is not None:
            continue
        at = source.tensors.entries[name]["path"]
        canonical = next((c for other in layout.spellings if (c := other.canonical(name)) is not None), None)
        if canonical is None:
            raise ValueError(f"{at}: tensor {name!r} is in no row of the {layout.name!r} layout")
        twin = spelling.foreign(canonical)
        if twin in source.tensors.entries:
            raise ValueError(f"{at}: tensors {twin!r} and {name!r} are both {canonical!r}")
        raise ValueError(f"{at}: tensor {name!r} is spelled otherwise than the rest, where it would be {twin!r}")
    return spelling


@dataclass
class Contents:
    """The source's model: where each canonical tensor lies, and its description. `stated`: a configuration says all of it;
    otherwise it was derived from shapes and is good for shapes alone. `published` is what a foreign config.json said."""

    names: dict[str, str]
    vision: VisionConfig | None
    language: LanguageConfig | None
    stated: bool
    published: dict[str, Any] | None = None


def read_contents(source: Source, layout: Layout, spelling: Spelling, report: Report) -> Contents:
    """Maps every name, settles the head, and holds names and shapes against the configuration."""
    names: dict[str, str] = {}
    for foreign in source.tensors.shapes:
        canonical = spelling.canonical(foreign)
        if canonical is None:
            report.left_out[foreign] = spelling.reason(foreign)
            continue
        assert canonical not in names, f"two rows of one spelling of {layout.name!r} map to {canonical!r}"
        source.tensors.check_readable(foreign)
        names[canonical] = foreign
    _leave_out_fillers(source, names, report)
    vision, language = source.vision, source.language
    stated = _stated(source, layout, names, report) if vision is None else (vision, language)
    tied = stated[1].tied_head if stated and stated[1] else None
    _settle_head(source, names, tied, report)
    vision, language = stated or _derived(source, names)
    _check_shapes(source, layout, spelling, names, vision, language)
    contents = Contents(names, vision, language, stated is not None)
    if stated and source.tree is not None:
        here = {"layout": layout.name, "spelling": layout.spellings.index(spelling), "config": source.tree}
        contents.published = _published(source) if layout.name in OURS else here
    return contents


def _published(source: Source) -> dict[str, Any] | None:
    """What a default directory remembers of the publisher's, so that it can be written again as it was."""
    record = source.tree.get("published")
    if record is None:
        return None
    try:
        known = isinstance(record["config"], dict) and record["spelling"] in range(len(LAYOUTS[record["layout"]].spellings))
    except (KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{source.config_path}: its record under 'published' is damaged; without it the names stay readable")
    return record


def _leave_out_fillers(source: Source, names: dict[str, str], report: Report) -> None:
    """Leaves out what an earlier conversion wrote to complete the tower, as long as it is still that."""
    ours = (source.tree or {}).get("granvit")
    listed = ours.get("filled") if isinstance(ours, dict) else None
    for canonical, foreign in list(names.items()):
        if isinstance(listed, list) and foreign in listed and np.all(source.tensors.read(foreign) == _filler_value(canonical)):
            report.left_out[foreign] = "written by an earlier conversion to complete the tower: nothing reads it"
            del names[canonical]


def _stated(
    source: Source, layout: Layout, names: dict[str, str], report: Report
) -> tuple[VisionConfig | None, LanguageConfig | None] | None:
    """The model that config.json describes; None where there is none."""
    if source.tree is None or (source.beside and source.tree.get("model_type") not in layout.model_types):
        report.notes.append("no config.json of this model: names and shapes were held against each other alone")
        return None
    label = source.path.name if source.path.is_dir() else source.path.parent.name
    try:
        fields = layout.read_config(source.tree)
        vision = _vision({"name": label} | fields["vision"], names) if "vision" in fields else None
        language = LanguageConfig(**({"name": label} | fields["language"])) if "language" in fields else None
    except KeyError as error:
        if source.beside:
            report.notes.append(f"{source.config_path} is not of this layout and was not read")
            return None
        raise ValueError(f"{source.config_path}: no key {error.args[0]!r}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{source.config_path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{source.config_path}: {error}") from None
    for config in (vision, language):
        if config is not None and not 0 < config.layers <= len(names) + 1:  # before names are made for that many
            raise ValueError(f"{source.config_path}: {config.layers} layers, but {len(names)} tensors are there")
    return vision, language


def _vision(fields: dict[str, Any], names: dict[str, str]) -> VisionConfig:
    """An encoder that reaches as high as its tensors do: LLaVA's towers may come without the last block."""
    if "top" in fields:
        return VisionConfig(**fields)
    last = any(name.startswith(f"vision.encoder.layers.{fields['layers'] - 1}.") for name in names)
    top = "final" if "vision.post_layernorm.weight" in names else "last" if last else "penultimate"
    order = ("penultimate", "last", "final")
    level = min(fields.get("level", "penultimate"), top, key=order.index)
    return VisionConfig(**(fields | {"level": level, "top": top}))


def _settle_head(source: Source, names: dict[str, str], tied: bool | None, report: Report) -> None:
    """Leaves out a head that is the embedding once more; `ValueError` where it should be and is not.

    Without a configuration (`tied` None), equal bytes say that the head is tied.
    """
    if HEAD not in names or EMBEDDING not in names or tied is False:
        return
    head, embedding = names[HEAD], names[EMBEDDING]
    if source.tensors.digest(head) == source.tensors.digest(embedding):
        report.left_out[head] = f"the same bytes as {embedding!r}: the head is tied to the embedding"
        del names[HEAD]
    elif tied:
        at = source.tensors.entries[head]["path"]
        raise ValueError(f"{at}: tensor {head!r} differs from {embedding!r}, but tie_word_embeddings says that they are one")


def _derived(source: Source, names: dict[str, str]) -> tuple[VisionConfig | None, LanguageConfig | None]:
    """Encoder and decoder of these shapes. How queries split into heads does not follow from them: one head is assumed."""
    shapes = {canonical: source.tensors.shapes[foreign] for canonical, foreign in names.items()}
    parts = {part_of(name) for name in shapes}
    try:
        vision = _derived_vision(shapes) if "vision" in parts else None
        language = _derived_language(shapes) if "language" in parts else None
    except KeyError as error:
        raise ValueError(f"{source.path}: tensor {error.args[0]!r} (canonical name) is missing") from None
    except (ValidationError, ValueError, ZeroDivisionError):
        raise ValueError(f"{source.path}: the tensors' shapes are those of no model, and no config.json says more") from None
    return vision, language


def _blocks(shapes: Shapes, prefix: str) -> int:
    return 1 + max((int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)


def _derived_vision(shapes: Shapes) -> VisionConfig:
    width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
    class_token = "vision.embeddings.class_embedding" in shapes
    block = "vision.encoder.layers.0"
    closing = "vision.post_layernorm.weight" in shapes
    return VisionConfig(
        name="derived",
        width=width,
        patch_size=patch,
        image_size=patch * math.isqrt(shapes["vision.embeddings.position_embedding.weight"][0] - class_token),
        layers=_blocks(shapes, "vision.encoder.layers."),
        heads=1,
        mlp=shapes[f"{block}.mlp.fc1.weight"][0],
        norm="layer" if f"{block}.layer_norm1.bias" in shapes else "rms",
        gated_mlp=f"{block}.mlp.gate_proj.weight" in shapes,
        bias=f"{block}.mlp.fc1.bias" in shapes,
        patch_bias="vision.embeddings.patch_embedding.bias" in shapes,
        patch_norm="vision.embeddings.patch_norm.weight" in shapes,
        class_token=class_token,
        pre_norm="vision.pre_layernorm.weight" in shapes,
        layer_scale=f"{block}.layer_scale1" in shapes,
        closing_norm=closing,
        level="final" if closing else "last",
    )


def _derived_language(shapes: Shapes) -> LanguageConfig:
    vocab, width = shapes[EMBEDDING]
    block = "language.model.layers.0"
    queries, keys = shapes[f"{block}.self_attn.q_proj.weight"][0], shapes[f"{block}.self_attn.k_proj.weight"][0]
    return LanguageConfig(
        name="derived",
        vocab=vocab,
        width=width,
        layers=_blocks(shapes, "language.model.layers."),
        heads=queries // keys,
        kv_heads=1,
        head_dim=keys,
        mlp=shapes[f"{block}.mlp.gate_proj.weight"][0],
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_head=HEAD not in shapes,
        qkv_bias=f"{block}.self_attn.q_proj.bias" in shapes,
    )


def _check_shapes(
    source: Source,
    layout: Layout,
    spelling: Spelling,
    names: dict[str, str],
    vision: VisionConfig | None,
    language: LanguageConfig | None,
) -> None:
    """`ValueError` naming, in the source's words, the first tensors that are missing, unexpected or of another shape."""
    held = {part_of(name) for name in names}
    if layout.name not in OURS and held != layout.parts:
        raise ValueError(f"{source.path}: no tensor of the {sorted(layout.parts - held)[0]}, which {layout.name!r} has")
    expected: Shapes = {}
    if vision is not None:
        expected |= vision_shapes(vision)
    if "projector" in held and vision is not None and language is not None:
        expected |= projector_shapes(vision, language)
    if language is not None:
        expected |= language_shapes(language)
    foreign = {names.get(name) or spelling.foreign(name) or name: shape for name, shape in expected.items()}
    found = {name: source.tensors.shapes[name] for name in names.values()}
    wrong = shape_differences(found, foreign)
    if wrong:
        odd = next((name for name, shape in found.items() if foreign.get(name) != shape), None)
        at = source.tensors.entries[odd]["path"] if odd else source.path
        against = source.config_path if source.tree is not None and source.config_path else "the other tensors' shapes"
        raise ValueError(f"{at}: does not fit {against}: {'; '.join(wrong)}")


@dataclass
class Plan:
    """What is written: target name -> the source's name, or the shape and dtype of a filler; and the configuration."""

    names: dict[str, str]
    shapes: Shapes
    fillers: dict[str, tuple[float, np.dtype]]
    config: dict[str, Any] | None


def make_plan(source: Source, contents: Contents, target: Layout, report: Report) -> Plan:
    """Names every tensor in the target's words; `ValueError` where the target has none, or needs a part that is not there."""
    parts = {part_of(name) for name in contents.names}
    holds = ", ".join(part for part in PARTS if part in target.parts)
    lacking = target.parts - parts
    if lacking and target.name not in OURS:
        raise ValueError(f"{source.path}: holds no {' and no '.join(sorted(lacking))}; the {target.name!r} layout needs {holds}")
    vision = contents.vision if "vision" in target.parts else None
    language = contents.language if "language" in target.parts else None
    try:
        tree = target.write_config(vision, language)
    except ValueError as error:
        raise ValueError(f"{source.path}: cannot be written as {target.name!r}: {error}") from None
    came_from = contents.published if (contents.published or {}).get("layout") == target.name else None
    spelling = target.spellings[came_from["spelling"] if came_from else 0]
    plan = Plan({}, {}, {}, None)
    for canonical, foreign in contents.names.items():
        if part_of(canonical) not in target.parts:
            report.left_out[foreign] = f"the {target.name!r} layout holds {holds} alone"
            continue
        name = spelling.foreign(canonical)
        if name is None:
            raise ValueError(f"{source.path}: tensor {foreign!r} has no name in the {target.name!r} layout")
        plan.names[name], plan.shapes[name] = foreign, source.tensors.shapes[foreign]
    if vision is not None and target in (SIGLIP, CLIP, LLAVA) and contents.stated and not came_from:
        _complete_tower(source, contents, vision, spelling, plan, report)
    if contents.stated:
        plan.config = _config(tree, source, contents, target, plan, came_from, report)
    return plan


def _filler_value(canonical: str) -> float:
    """Zeros, and norms of weight one: such a block passes its input on."""
    return float("norm" in canonical and canonical.endswith(".weight"))


def _complete_tower(
    source: Source, contents: Contents, vision: VisionConfig, spelling: Spelling, plan: Plan, report: Report
) -> None:
    """Adds the blocks above `vision.level` that are not in the source: transformers builds them, though nothing reads them."""
    if not vision.closing_norm:
        return
    dtype = source.tensors.dtypes[source.tensors.entries[contents.names["vision.embeddings.patch_embedding.weight"]]["tag"]]
    for canonical, shape in vision_shapes(VisionConfig(**{**vision.model_dump(), "top": "final"})).items():
        if canonical not in contents.names:
            name = spelling.foreign(canonical)
            plan.fillers[name], plan.shapes[name] = (_filler_value(canonical), dtype), shape
            report.filled.append(name)


def _config(tree: dict[str, Any], source: Source, contents: Contents, target: Layout, plan: Plan,
            came_from: dict[str, Any] | None, report: Report) -> dict[str, Any]:  # fmt: skip
    """The target's config.json: `tree` with what the publisher's said beyond it, and what follows from the tensors."""
    if target.name in OURS:
        return tree | ({"published": contents.published} if contents.published else {})
    if came_from and came_from["config"].get("model_type") == tree["model_type"]:
        tree = _merged(came_from["config"], tree)
    dtypes = {source.tensors.dtypes[source.tensors.entries[name]["tag"]].name for name in plan.names.values()}
    if len(dtypes) == 1 and not {"dtype", "torch_dtype"} & tree.keys():
        tree["torch_dtype"] = dtypes.pop()
    if target is LLAVA and "image_token_index" not in tree:
        tree["image_token_index"] = contents.language.vocab - 1
        report.notes.append(f"image_token_index is {tree['image_token_index']}, the last token id: let it stand for the image")
    if plan.fillers:
        tree["granvit"] = {"filled": list(plan.fillers)}
    return tree


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, objects merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merged(below[key], value) if both else value
    return merged


def _bytes(source: Source, plan: Plan) -> dict[str, int]:
    sizes = {t: sum(n for _, n in source.tensors.entries[s]["spans"]) for t, s in plan.names.items()}
    return sizes | {t: math.prod(plan.shapes[t]) * dtype.itemsize for t, (_, dtype) in plan.fillers.items()}


def _arrays(source: Source, plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that is written, one in memory at a time."""
    for name, foreign in plan.names.items():
        yield name, source.tensors.read(foreign)
    for name, (value, dtype) in plan.fillers.items():
        yield name, np.full(plan.shapes[name], value, dtype)


@contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A folder beside the destination that is gone afterwards, with what is left in it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f".tmp-{destination.name}-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(source: Source, plan: Plan, target: Layout, destination: Path, verify: bool, report: Report,
           progress: ProgressCallback) -> None:  # fmt: skip
    """Writes beside the destination, re-reads, renames."""
    one_file = destination.suffix in (".ckpt", ".safetensors")
    as_ckpt = destination.suffix == ".ckpt" or (not one_file and target.name in IN_CKPT)
    sizes = _bytes(source, plan)
    with _beside(destination) as folder:
        inside = folder if one_file else folder / destination.name
        inside.mkdir(exist_ok=True)
        stem = destination.stem if one_file else "model"
        if as_ckpt:
            writer = CkptWriter(inside / f"{stem}.ckpt", plan.shapes)
        else:
            limit = sum(sizes.values()) if one_file else SHARD_BYTES
            checksums = not one_file and target is DEFAULT
            writer = TensorWriter(inside, stem, plan.shapes, limit, dict(target.metadata), checksums)
        done = 0
        with writer:
            for name, array in _arrays(source, plan):
                writer.add(name, array)
                done += array.nbytes
                del array  # before the next one is read
                progress("writing", done, sum(sizes.values()))
            digests = writer.finish()
        if plan.config is not None and not one_file:
            write_synced(inside / "config.json", json.dumps(plan.config, indent=2) + "\n")
        elif plan.config is not None:
            report.notes.append("one file holds no configuration: a directory as DST would have a config.json")
        if verify:
            written = CkptFile(inside / f"{stem}.ckpt") if as_ckpt else TensorSet(inside, stem)
            _verify(source, plan, written, digests, sizes, progress)
        sync_directory(inside)
        if os.path.lexists(destination):
            raise ValueError(f"{destination}: has come to exist meanwhile; nothing was replaced")
        os.rename(inside / destination.name if one_file else inside, destination)
        sync_directory(destination.parent)
    report.tensors, report.bytes, report.verified = len(plan.shapes), sum(sizes.values()), verify


def _verify(source: Source, plan: Plan, written: StoredTensors, digests: dict[str, str], sizes: dict[str, int],
            progress: ProgressCallback) -> None:  # fmt: skip
    """Reads back what was written: names, shapes, dtypes and the sha256 of every tensor's bytes."""
    found = shape_differences(written.shapes, plan.shapes)
    if found:
        raise ValueError(f"what was written reads back differently: {'; '.join(found)}")
    done = 0
    for name, foreign in (plan.names | dict.fromkeys(plan.fillers)).items():
        kind = plan.fillers[name][1] if foreign is None else source.tensors.dtypes[source.tensors.entries[foreign]["tag"]]
        if written.dtypes[written.entries[name]["tag"]] != kind or written.digest(name) != digests[name]:
            raise ValueError(f"{written.entries[name]['path']}: tensor {name!r} reads back differently from what was written")
        done += sizes[name]
        progress("verifying", done, sum(sizes.values()))


def convert(
    source: Path,
    destination: Path,
    to: str,
    from_: str | None = None,
    verify: bool = True,
    progress: ProgressCallback = lambda what, done, total: None,
) -> Report:
    """Converts `source` to the layout `to` at `destination`; everything is checked before the first tensor is written.

    `ValueError` says in one line what is wrong, where, and leaves no destination behind; `OSError` is the disk's.
    """
    source, destination, start = Path(source), Path(destination), time.perf_counter()
    target = _layout(to)
    if to == MINDSPORE.name and destination.suffix == ".safetensors":
        raise ValueError(f"{destination}: the layout {to!r} is a .ckpt file; 'default' has the same names in safetensors")
    if os.path.lexists(destination):
        raise ValueError(f"{destination}: exists already; remove it or choose another name")
    opened = open_source(source)
    layout, spelling = detect(opened, from_)
    report = Report(source, destination, layout.name, target.name)
    contents = read_contents(opened, layout, spelling, report)
    plan = make_plan(opened, contents, target, report)
    _write(opened, plan, target, destination, verify, report, progress)
    report.seconds = time.perf_counter() - start
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


class Bar:
    """Progress on stderr: live on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.live = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.tasks: dict[str, int] = {}
        self.shown = time.monotonic()

    def __enter__(self) -> "Bar":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.live.add_task(what, total=total)
            self.live.update(self.tasks[what], completed=done)
        elif time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print(f"{what} {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)


def _pattern(names: Sequence[str]) -> str:
    """One name, or what several have in common."""
    if len(names) == 1:
        return names[0]
    common = []
    for words in zip(*(name.split(".") for name in names), strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return f"{'.'.join([*common, '*'])} ({len(names)} tensors)"


def lines(report: Report) -> Iterator[str]:
    """The report in words: what was left out or added and why, sizes, time and memory."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in report.left_out.items():
        groups.setdefault((name.split(".")[0], reason), []).append(name)
    for (_, reason), names in groups.items():
        yield f"left out {_pattern(names)}: {reason}"
    if report.filled:
        yield f"added {_pattern(report.filled)}: blocks that transformers builds above the level in use (zeros; norms of one)"
    yield from (f"note: {note}" for note in report.notes)
    yield (
        f"{report.from_layout} -> {report.to_layout}: {report.tensors} tensors, {report.bytes / 1e9:.3f} GB, "
        f"{'verified' if report.verified else 'not verified'}, {report.seconds:.1f} s, "
        f"peak memory {report.peak_bytes / 1e6:.0f} MB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="what is converted; never written to")
    parser.add_argument("destination", metavar="DST", type=Path, help="what is made; must not exist")
    parser.add_argument("--to", metavar="LAYOUT", required=True, choices=tuple(LAYOUTS), help="the layout of DST")
    parser.add_argument("--from", dest="from_", metavar="LAYOUT", choices=tuple(LAYOUTS), help="that of SRC (default: detected)")
    parser.add_argument("--no-verify", action="store_true", help="do not re-read what was written")
    options = parser.parse_args(arguments)
    try:
        with Bar() as bar:
            report = convert(options.source, options.destination, options.to, options.from_, not options.no_verify, bar)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that removes what is half written
    sys.exit(main())
