"""Foreign checkpoint layouts: one small table each, read in both directions.

A table's row pairs a foreign name with the canonical one; `{i}` stands for a block's number, `{p}` for `weight` or `bias`, `{*}`
for anything, and what follows an `@` for a part of the tensor (see `granvit.checkpoint.combined_tensors`). A name that no row
meets is an error that names it: nothing is skipped in silence.
"""
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from granvit.models import LanguageConfig, VisionConfig, part_of

CHOSEN = ("name", "level", "built_level", "top", "tiles", "mean", "std", "resize", "chat")  # `top`: `built_level` before
PLACEHOLDERS = {"{i}": r"(\d+)", "{p}": r"(weight|bias)", "{*}": r"(.*)"}
Pairs = tuple[tuple[str, str], ...]


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for placeholder, group in PLACEHOLDERS.items():
        expression = expression.replace(re.escape(placeholder), group)
    return re.compile(expression)


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the placeholders stand for, where the pattern meets the name."""
    found = _expression(pattern).fullmatch(name)
    return found and found.groups()


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a table's pattern meets the name."""
    return _match(pattern, name) is not None


def _fill(pattern: str, values: Iterable[str]) -> str:
    remaining = iter(values)
    return re.sub(r"\{.\}", lambda placeholder: next(remaining, placeholder.group()), pattern)


@dataclass(frozen=True)
class Spelling:
    """One set of foreign names: `rows` pair them with canonical ones, `left_out` with the reason why they have no place here."""

    rows: Pairs
    left_out: Pairs = ()

    def __add__(self, other: "Spelling") -> "Spelling":
        return Spelling(self.rows + other.rows, self.left_out + other.left_out)

    def prefixed(self, prefix: str) -> "Spelling":
        """The same names with `prefix` before them."""
        rows, left_out = (tuple((prefix + foreign, other) for foreign, other in pairs) for pairs in (self.rows, self.left_out))
        return Spelling(rows, left_out)

    def canonical(self, foreign: str) -> str | None:
        """The canonical name; None where no row meets the name."""
        return next((_fill(to, v) for pattern, to in self.rows if (v := _match(pattern, foreign)) is not None), None)

    def foreign(self, canonical: str) -> str | None:
        """The foreign name; None where no row meets the canonical one."""
        return next((_fill(to, v) for to, pattern in self.rows if (v := _match(pattern, canonical)) is not None), None)

    def reason(self, foreign: str) -> str | None:
        """Why the foreign name is left out; None where it is not."""
        return next((reason for pattern, reason in self.left_out if _match(pattern, foreign) is not None), None)


@dataclass(frozen=True)
class Layout:
    """How one publisher writes one kind of model.

    `model_types` are the values of config.json's `model_type` that have this layout. A file keeps to one of `spellings`; the
    first is the one written. `read_config` turns a config.json into fields of our `VisionConfig` and `LanguageConfig`, by
    part; `write_config` is its inverse and raises `ValueError` for a model that this layout has no words for. `pairs` are
    canonical names of which the second comes wherever the first does. `metadata` goes into the files' headers. `pixels` are the
    fields of `VisionConfig` that config.json leaves to preprocessor_config.json, as this family has them.
    """

    name: str
    model_types: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    read_config: Callable[[dict[str, Any]], dict[str, dict[str, Any]]]
    write_config: Callable[[Any, Any], dict[str, Any]]  # of the encoder and the decoder; None where the layout holds no such part
    pairs: Pairs = ()
    metadata: tuple[tuple[str, str], ...] = ()
    pixels: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that this layout holds."""
        return frozenset(part_of(canonical) for _, canonical in self.spellings[0].rows)

    def spelling_for(self, canonicals: Collection[str]) -> Spelling:
        """The first spelling that has a name for all of these that belong here; the first of all where none has."""
        own = [name for name in canonicals if part_of(name) in self.parts]
        return next((s for s in self.spellings if all(s.foreign(name) for name in own)), self.spellings[0])

    def canonical(self, foreign: str) -> str | None:
        """The canonical name, or None for a name that is left out; `ValueError` for one that no row maps."""
        for spelling in self.spellings:
            if (canonical := spelling.canonical(foreign)) is not None:
                return canonical
            if spelling.reason(foreign) is not None:
                return None
        raise ValueError(f"tensor {foreign!r} is in no row of the {self.name!r} layout")

    def check_config(self, tree: dict[str, Any], ours: VisionConfig | LanguageConfig, origin: str) -> None:
        """`ValueError` naming the first field in which the directory's config.json is another model than `ours`.

        What a run chooses for itself (`CHOSEN`) may differ.
        """
        part = "vision" if isinstance(ours, VisionConfig) else "language"
        try:
            fields = self.read_config(tree)[part]
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        for name, value in fields.items():
            if name not in CHOSEN and value != getattr(ours, name):
                raise ValueError(
                    f"{origin} describes another model than configs/models/{ours.name}.yaml: {name} is {value!r} there and "
                    f"{getattr(ours, name)!r} here"
                )


def one_of(names: dict[Any, str], value: Any, key: str) -> str:
    """`names[value]`; `ValueError` naming the key of a config.json whose value has no counterpart here."""
    if value not in names:
        raise ValueError(f"{key} {value!r} has no counterpart; known: {', '.join(map(str, names))}")
    return names[value]


def refuse_unlike(vision: VisionConfig, structure: dict[str, Any], family: str) -> None:
    """`ValueError` naming the first field in which an encoder is not built as the family's are."""
    for name, value in structure.items():
        if getattr(vision, name) != value:
            raise ValueError(f"this encoder has {name}={getattr(vision, name)!r}, which {family} has no names for")


OPENAI_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "resize": "bicubic",
}  # fmt: skip
