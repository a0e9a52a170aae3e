"""Detects the layout of a source from its config.json and its tensors' names."""
from collections.abc import Sequence

from granvit.checkpoint.combined_tensors import name_in_file, part_names
from granvit.checkpoint.layouts import Layout, Spelling
from granvit.checkpoint.layouts.aimv2 import AIMV2, AIMV2_APPLE
from granvit.checkpoint.layouts.clip import CLIP
from granvit.checkpoint.layouts.default import DEFAULT
from granvit.checkpoint.layouts.internvit import INTERNVIT, INTERNVIT_HUB
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.llava import LLAVA
from granvit.checkpoint.layouts.mindformers import MINDFORMERS
from granvit.checkpoint.layouts.mindspore import MINDSPORE
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.source import Source

DETECTED = (DEFAULT, SIGLIP, CLIP, AIMV2, AIMV2_APPLE, INTERNVIT, INTERNVIT_HUB, QWEN2, LLAMA, LLAVA, MINDFORMERS)
LAYOUTS = {layout.name: layout for layout in (*DETECTED, MINDSPORE)}  # MINDSPORE has the names of DEFAULT
OURS = ("default", "mindspore")  # these may have any subset of the model's parts


def detect(source: Source, named: str | None) -> tuple[Layout, Spelling]:
    """The source's layout and spelling, from config.json and tensor names, or those of the layout `named`.

    `ValueError` if none or several layouts fit, or a tensor's name is unknown.
    """
    if source.vision is not None:  # a run's checkpoint
        if named not in (None, DEFAULT.name):
            raise ValueError(f"{source.path}: a run's checkpoint has the layout {DEFAULT.name!r}, not {named!r}")
        return DEFAULT, DEFAULT.spellings[0]
    names = list(source.tensors.shapes)
    if named is not None:
        layout = layout_named(named)
        return layout, _best_spelling(source, layout, names)
    stated = _by_model_type(source)
    fitting = [layout for layout in (stated or DETECTED) if any(_explains(layout, s, names) for s in layout.spellings)]
    if len(fitting) > 1:
        candidates = ", ".join(layout.name for layout in fitting)
        raise ValueError(f"{source.path}: its tensor names fit several layouts ({candidates}); name one with --from")
    # If none fits, the closest one is used for an error that names the tensor.
    layout = fitting[0] if fitting else max(stated or DETECTED, key=lambda layout: _mapped(layout, names))
    if not fitting and not _mapped(layout, names):
        file = source.tensors.entries[names[0]]["path"] if names else source.path
        what = f"tensor {names[0]!r} is in no known layout" if names else "has no tensors"
        raise ValueError(f"{file}: {what}; known: {', '.join(layout.name for layout in stated or DETECTED)}")
    return layout, _best_spelling(source, layout, names)


def _by_model_type(source: Source) -> tuple[Layout, ...]:
    """The layouts with the `model_type` of config.json; empty if there is no config.json, or one that may be of another file."""
    if source.tree is None or (source.beside and "model_type" not in source.tree):
        return ()
    model_type = source.tree.get("model_type")
    found = tuple(layout for layout in DETECTED if model_type in layout.model_types)
    if not found and not source.beside:
        known = ", ".join(dict.fromkeys(t for layout in DETECTED for t in layout.model_types))
        raise ValueError(f"{source.config_path}: model_type {model_type!r}; known: {known}; or name the layout with --from")
    if source.beside:  # it may belong to another file: used only if the names agree
        names = list(source.tensors.shapes)
        found = tuple(layout for layout in found if any(_explains(layout, s, names) for s in layout.spellings))
    return found


def layout_named(name: str) -> Layout:
    """The layout with this name; `ValueError` if there is none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is not known; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _explains(layout: Layout, spelling: Spelling, names: Sequence[str]) -> bool:
    mapped = [(name, spelling.canonical(name)) for name in part_names(names, layout)]
    if not any(canonical for _, canonical in mapped):
        return False
    if any(canonical is None and spelling.reason(name) is None for name, canonical in mapped):
        return False
    return not _unpaired(layout, [canonical for _, canonical in mapped if canonical])


def _unpaired(layout: Layout, canonicals: Sequence[str]) -> bool:
    """Whether the first name of one of the layout's pairs is present without the second."""
    present = set(canonicals)
    for first, second in layout.pairs:
        pairing = Spelling(((second, first),))
        if any((partner := pairing.foreign(name)) is not None and partner not in present for name in present):
            return True
    return False


def _mapped(layout: Layout, names: Sequence[str]) -> int:
    names = part_names(names, layout)
    return max(sum(spelling.canonical(name) is not None for name in names) for spelling in layout.spellings)


def _best_spelling(source: Source, layout: Layout, names: Sequence[str]) -> Spelling:
    """The spelling that maps the most names; `ValueError` naming the first tensor that it neither maps nor leaves out."""
    names = part_names(names, layout)
    spelling = max(layout.spellings, key=lambda s: sum(s.canonical(name) is not None for name in names))
    for name in names:
        if spelling.canonical(name) is not None or spelling.reason(name) is not None:
            continue
        file = source.tensors.entries[name_in_file(name)]["path"]
        canonical = next((c for other in layout.spellings if (c := other.canonical(name)) is not None), None)
        if canonical is None:
            raise ValueError(f"{file}: tensor {name!r} is in no row of the {layout.name!r} layout")
        twin = spelling.foreign(canonical)
        if twin in source.tensors.entries:
            raise ValueError(f"{file}: tensors {twin!r} and {name!r} are both {canonical!r}; remove one")
        raise ValueError(f"{file}: tensor {name!r} should be named {twin!r}, like the other tensors")
    return spelling
