"""Layouts against our configuration: what a family's config.json cannot say is refused, not lost."""
from typing import Literal, get_args, get_origin

import pytest

from granvit.checkpoint.detect import DETECTED
from granvit.checkpoint.layouts import CHOSEN, Layout
from granvit.config import vision_config
from granvit.models import VisionConfig

ENCODERS = {layout.name: layout for layout in DETECTED if layout.parts == {"vision"}}
ROWS = ("tiny-vision", "tiny-clip", "tiny-aimv2", "tiny-internvit")


def native(layout: Layout) -> VisionConfig:
    """A tiny encoder that the layout has words for."""
    for row in ROWS:
        try:
            layout.write_config(vision_config(row), None)
            return vision_config(row)
        except ValueError:
            continue
    raise AssertionError(f"no row of {ROWS} is built as {layout.name} has it: add one")


def neighbours(vision: VisionConfig):
    """Encoders that differ in one option of the structure."""
    for name, info in VisionConfig.model_fields.items():
        kind = info.annotation
        values = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        for value in values if name not in CHOSEN else ():
            if value != getattr(vision, name):
                yield name, vision.model_copy(update={name: value})


@pytest.mark.parametrize("layout", ENCODERS.values(), ids=ENCODERS)
def test_an_option_that_a_family_does_not_have_is_refused_or_written(layout):
    vision = native(layout)
    assert layout.read_config(layout.write_config(vision, None))["vision"].items() <= vision.model_dump().items()
    for name, other in neighbours(vision):
        try:
            tree = layout.write_config(other, None)
        except ValueError:
            continue
        assert layout.read_config(tree)["vision"].get(name) == getattr(other, name), f"{name}={getattr(other, name)} is lost"
