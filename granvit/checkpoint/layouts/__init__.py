"""Foreign checkpoint layouts: one small table each, readable in both directions.

A table's row pairs a foreign name with the canonical one; `{i}` stands for a block's number, `{p}` for `weight` or `bias`, `{*}`
for anything. A name that no row meets is an error that names it: nothing is skipped in silence.
"""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from granvit.models import LanguageConfig, VisionConfig

PLACEHOLDERS = {"{i}": r"(\d+)", "{p}": r"(weight|bias)", "{*}": r"(.*)"}


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the placeholders stand for, where the pattern meets the name."""
    expression = re.escape(pattern)
    for placeholder, group in PLACEHOLDERS.items():
        expression = expression.replace(re.escape(placeholder), group)
    found = re.fullmatch(expression, name)
    return found and found.groups()


def _fill(pattern: str, values: Iterable[str]) -> str:
    for value in values:
        pattern = re.sub(r"\{.\}", lambda _, value=value: value, pattern, count=1)
    return pattern


@dataclass(frozen=True)
class Layout:
    """How one publisher writes one kind of model.

    `model_types` are the values of config.json's `model_type` that have this layout; `rows` pair foreign with canonical names;
    `left_out` pairs foreign names that have no place here with the reason; any of `prefixes` may stand before every
    name. `read_config` turns the directory's config.json into fields of our `VisionConfig` or `LanguageConfig`.
    """

    name: str
    model_types: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    prefixes: tuple[str, ...] = ("",)

    def canonical(self, foreign: str) -> str | None:
        """The canonical name, or None for a name that is left out; `ValueError` for one that no row maps."""
        for prefix in self.prefixes:
            bare = foreign.removeprefix(prefix)
            if not foreign.startswith(prefix):
                continue
            for pattern, canonical in self.rows:
                if (values := _match(pattern, bare)) is not None:
                    return _fill(canonical, values)
            if any(_match(pattern, bare) is not None for pattern, _ in self.left_out):
                return None
        raise ValueError(f"tensor {foreign!r} is in no row of the {self.name!r} layout")

    def check_config(self, tree: dict[str, Any], ours: VisionConfig | LanguageConfig, origin: str) -> None:
        """`ValueError` naming the first field in which the directory's config.json is another model than `ours`."""
        for field, value in self.read_config(tree).items():
            if value != getattr(ours, field):
                raise ValueError(
                    f"{origin} describes another model than configs/models/{ours.name}.yaml: {field} is {value!r} there and "
                    f"{getattr(ours, field)!r} here"
                )
