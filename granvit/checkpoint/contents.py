"""Maps a source's tensors to canonical names, and determines the model's configuration.

Names, shapes and config.json are checked against each other before anything is written.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from granvit.checkpoint.combined_tensors import SeparatedTensors, name_in_file, shape_in_file
from granvit.checkpoint.detect import LAYOUTS, OURS, detect
from granvit.checkpoint.layouts import Layout, Spelling
from granvit.checkpoint.source import Source, open_source, read_json
from granvit.checkpoint.tensors import shape_differences
from granvit.models import LanguageConfig, Shapes, VisionConfig, language_shapes, part_of, projector_shapes, vision_shapes

RESAMPLE: dict[Any, str] = {2: "bilinear", 3: "bicubic"}  # the numbers in preprocessor_config.json are Pillow's
EMBEDDING, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"


@dataclass
class Contents:
    """The source's model. `names` maps canonical names to names in the source. `vision` and `language` are the configurations:
    complete if `stated`; otherwise derived from shapes, and to be used for shapes only. `published` is the content of a foreign
    config.json with its layout and spelling. `left_out` maps tensors that are not used to the reason, `notes` are messages for
    the user."""

    names: dict[str, str] = field(default_factory=dict)
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    stated: bool = False
    published: dict[str, Any] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_contents(path: Path, named: str | None = None) -> tuple[Source, Layout, Contents]:
    """Opens the source at `path`, in the layout `named` or the detected one; its tensors have the names of the layout's table.

    Tensors are read only to compare a head with the embedding and to recognise fillers.
    """
    source = open_source(path)
    layout, spelling = detect(source, named)
    source = replace(source, tensors=SeparatedTensors(source.tensors, layout))
    return source, layout, read_contents(source, layout, spelling)


def read_contents(source: Source, layout: Layout, spelling: Spelling) -> Contents:
    """Maps all names to canonical ones and checks names and shapes against the configuration; `ValueError` if they differ."""
    contents = Contents()
    names = contents.names
    for foreign in source.tensors.shapes:
        canonical = spelling.canonical(foreign)
        if canonical is None:
            reason = spelling.reason(foreign)
            assert reason is not None, foreign
            contents.left_out[foreign] = reason
            continue
        assert canonical not in names, f"two rows of one spelling of {layout.name!r} map to {canonical!r}"
        source.tensors.check_readable(foreign)
        names[canonical] = foreign
    _leave_out_fillers(source, contents)
    stated = _stated(source, layout, contents) if source.vision is None else (source.vision, source.language)
    contents.stated = stated is not None
    _settle_head(source, contents, stated[1].tied_head if stated and stated[1] else None)
    contents.vision, contents.language = stated or _derived(source, names)
    _check_shapes(source, layout, spelling, contents)
    if stated and source.tree is not None:
        published = {"layout": layout.name, "spelling": layout.spellings.index(spelling), "config": source.tree}
        contents.published = _published(source) if layout.name in OURS else published
    return contents


def _published(source: Source) -> dict[str, Any] | None:
    """The record of the publisher's config.json in a default directory, with which the publisher's files can be written again."""
    assert source.tree is not None
    record = source.tree.get("published")
    if record is None:
        return None
    try:
        known = isinstance(record["config"], dict) and record["spelling"] in range(len(LAYOUTS[record["layout"]].spellings))
    except (KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{source.config_path}: the key 'published' is damaged; remove it: the tensors can be read without")
    return record


def _leave_out_fillers(source: Source, contents: Contents) -> None:
    """Leaves out the fillers that an earlier conversion added (`granvit.checkpoint.convert`), unless any of them has changed."""
    ours = (source.tree or {}).get("granvit")
    listed = ours.get("filled") if isinstance(ours, dict) else None
    if not isinstance(listed, list):
        return
    fillers = {canonical: foreign for canonical, foreign in contents.names.items() if name_in_file(foreign) in listed}
    if not all(np.all(source.tensors.read(foreign) == filler_value(canonical)) for canonical, foreign in fillers.items()):
        return  # trained since then
    for canonical, foreign in fillers.items():
        contents.left_out[foreign] = "a filler of an earlier conversion, which the model does not use"
        del contents.names[canonical]


def filler_value(canonical: str) -> float:
    """The value of a filler: 1 for the weights of norms, else 0. A block of fillers is the identity."""
    return float("norm" in canonical and canonical.endswith(".weight"))


def _stated(source: Source, layout: Layout, contents: Contents) -> tuple[VisionConfig | None, LanguageConfig | None] | None:
    """The configurations of encoder and decoder in config.json; None if there is no config.json of this model."""
    if source.tree is None or (source.beside and source.tree.get("model_type") not in layout.model_types):
        contents.notes.append("no config.json of this model: names and shapes were only checked against each other")
        return None
    label = source.path.name if source.path.is_dir() else source.path.parent.name
    try:
        fields = layout.read_config(source.tree)
        vision = None
        if "vision" in fields:
            pixels = {} if layout.name in OURS else _pixels(source, contents)
            vision = _vision({"name": label} | layout.pixels | fields["vision"] | pixels, contents)
        language = LanguageConfig(**({"name": label} | fields["language"])) if "language" in fields else None
    except KeyError as error:
        if source.beside:
            contents.notes.append(f"{source.config_path} is not of this layout and was not used")
            return None
        raise ValueError(f"{source.config_path}: no key {error.args[0]!r}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{source.config_path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{source.config_path}: {error}") from None
    for config in (vision, language):
        # A damaged config.json may state any number: `_check_shapes` would make names for all of its layers.
        if config is not None and not 0 < config.layers <= len(contents.names) + 1:
            raise ValueError(f"{source.config_path}: {config.layers} layers, but there are {len(contents.names)} tensors")
    return vision, language


def _pixels(source: Source, contents: Contents) -> dict[str, Any]:
    """The fields of `VisionConfig` that preprocessor_config.json states."""
    assert source.config_path is not None  # config.json was read
    path = source.config_path.parent / "preprocessor_config.json"
    if not path.exists():
        contents.notes.append("no preprocessor_config.json: mean, std and resize are the defaults of this family")
        return {}
    tree = read_json(path)
    stated = {"mean": tree.get("image_mean"), "std": tree.get("image_std"), "resize": RESAMPLE.get(tree.get("resample"))}
    return {field: value for field, value in stated.items() if value is not None}


def _vision(fields: dict[str, Any], contents: Contents) -> VisionConfig:
    """The encoder's configuration, with `built_level` from the tensors: LLaVA checkpoints may lack the last block."""
    if {"top", "built_level"} & fields.keys():
        return VisionConfig(**fields)
    names = contents.names
    last = any(name.startswith(f"vision.encoder.layers.{fields['layers'] - 1}.") for name in names)
    for name in [name for name in names if name.startswith("vision.post_layernorm.") and not last]:
        contents.left_out[names.pop(name)] = "the closing norm: the last block before it is missing"
    built_level = "final" if "vision.post_layernorm.weight" in names else "last" if last else "penultimate"
    return VisionConfig(**(fields | {"built_level": built_level}))


def _settle_head(source: Source, contents: Contents, tied: bool | None) -> None:
    """Leaves out a head that equals the embedding; `ValueError` if `tied` and they differ.

    Without a configuration (`tied` None), a head with the same bytes as the embedding is taken to be tied.
    """
    names = contents.names
    if HEAD not in names or EMBEDDING not in names or tied is False:
        return
    head, embedding = names[HEAD], names[EMBEDDING]
    if source.tensors.digest(head) == source.tensors.digest(embedding):
        contents.left_out[head] = f"the same bytes as {embedding!r}: the head is tied to the embedding"
        del names[HEAD]
    elif tied:
        file = source.tensors.entries[head]["path"]
        remedy = "set it to false in config.json to keep the head"
        raise ValueError(f"{file}: tensor {head!r} differs from {embedding!r}, but tie_word_embeddings is true: {remedy}")


def _derived(source: Source, names: dict[str, str]) -> tuple[VisionConfig | None, LanguageConfig | None]:
    """Encoder and decoder configurations derived from shapes; the number of heads is unknown, one (key) head is assumed."""
    shapes = {canonical: source.tensors.shapes[foreign] for canonical, foreign in names.items()}
    parts = {part_of(name) for name in shapes}
    try:
        vision = _derived_vision(shapes) if "vision" in parts else None
        language = _derived_language(shapes) if "language" in parts else None
    except KeyError as error:
        raise ValueError(f"{source.path}: tensor {error.args[0]!r} (canonical name) is missing") from None
    except (ValidationError, ValueError, ZeroDivisionError):
        raise ValueError(f"{source.path}: the tensors' shapes fit no model; a config.json is needed") from None
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


def _in_file(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    return name_in_file(name), shape_in_file(name, shape)


def _check_shapes(source: Source, layout: Layout, spelling: Spelling, contents: Contents) -> None:
    """`ValueError` naming, as in the source, the first tensors that are missing, unexpected or of another shape."""
    names, vision, language = contents.names, contents.vision, contents.language
    held = {part_of(name) for name in names}
    if layout.name not in OURS and held != layout.parts:
        raise ValueError(f"{source.path}: no tensor of the {sorted(layout.parts - held)[0]}; {layout.name!r} needs it")
    expected: Shapes = {}
    if vision is not None:
        expected |= vision_shapes(vision)
    if "projector" in held and vision is not None and language is not None:
        expected |= projector_shapes(vision, language)
    if language is not None:
        expected |= language_shapes(language)
    foreign = dict(_in_file(names.get(name) or spelling.foreign(name) or name, shape) for name, shape in expected.items())
    found = dict(_in_file(name, source.tensors.shapes[name]) for name in names.values())
    wrong = shape_differences(found, foreign)
    if wrong:
        misfit = next((name for name, shape in found.items() if foreign.get(name) != shape), None)
        file = next(e["path"] for n, e in source.tensors.entries.items() if name_in_file(n) == misfit) if misfit else source.path
        against = source.config_path if source.tree is not None and source.config_path else "the other tensors' shapes"
        raise ValueError(f"{file}: does not fit {against}: {'; '.join(wrong)}")


def common_name(names: Sequence[str]) -> str:
    """The one name, or the common prefix of several and their count."""
    if len(names) == 1:
        return names[0]
    words = zip(*(name.split(".") for name in names), strict=False)
    common = [at_one_place[0] for at_one_place in takewhile(lambda at_one_place: len(set(at_one_place)) == 1, words)]
    return f"{'.'.join([*common, '*'])} ({len(names)} tensors)"


def left_out_lines(left_out: dict[str, str]) -> Iterator[str]:
    """Lines about what was left out: one for all names with the same first component and the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out.items():
        groups.setdefault((name.split(".")[0], reason), []).append(name)
    for (_, reason), names in groups.items():
        yield f"left out {common_name(names)}: {reason}"
