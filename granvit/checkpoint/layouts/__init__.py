"""Foreign checkpoint layouts: for each a table of tensor names that is used for reading and writing.

A row of a table pairs a foreign name with the canonical one. `{i}` stands for a block's number, `{p}` for `weight` or `bias`,
`{*}` for any text; a suffix with `@` denotes a part of the tensor (see `granvit.checkpoint.combined_tensors`). A name that
matches no row is an error.
"""
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from granvit.models import LanguageConfig, VisionConfig, part_of

CHOSEN = ("name", "level", "built_level", "top", "tiles", "mean", "std", "resize", "chat")  # `top`: old name of `built_level`
PLACEHOLDERS = {"{i}": r"(\d+)", "{p}": r"(weight|bias)", "{*}": r"(.*)"}
Pairs = tuple[tuple[str, str], ...]


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for placeholder, group in PLACEHOLDERS.items():
        expression = expression.replace(re.escape(placeholder), group)
    return re.compile(expression)


def match(pattern: str, name: str) -> tuple[str, ...] | None:
    """The values of the placeholders; None if the name does not match the table's pattern."""
    found = _expression(pattern).fullmatch(name)
    return found and found.groups()


def _fill(pattern: str, values: Iterable[str]) -> str:
    remaining = iter(values)
    return re.sub(r"\{.\}", lambda placeholder: next(remaining, placeholder.group()), pattern)


@dataclass(frozen=True)
class Spelling:
    """One set of foreign names: `rows` pairs them with canonical names, `left_out` with the reason why they are not used."""

    rows: Pairs
    left_out: Pairs = ()

    def __add__(self, other: "Spelling") -> "Spelling":
        return Spelling(self.rows + other.rows, self.left_out + other.left_out)

    def prefixed(self, prefix: str) -> "Spelling":
        """The same spelling with `prefix` before all foreign names."""
        rows, left_out = (tuple((prefix + foreign, other) for foreign, other in pairs) for pairs in (self.rows, self.left_out))
        return Spelling(rows, left_out)

    def canonical(self, foreign: str) -> str | None:
        """The canonical name; None if no row matches."""
        return next((_fill(to, v) for pattern, to in self.rows if (v := match(pattern, foreign)) is not None), None)

    def foreign(self, canonical: str) -> str | None:
        """The foreign name; None if no row matches."""
        return next((_fill(to, v) for to, pattern in self.rows if (v := match(pattern, canonical)) is not None), None)

    def reason(self, foreign: str) -> str | None:
        """The reason why the foreign name is left out; None if it is not."""
        return next((reason for pattern, reason in self.left_out if match(pattern, foreign) is not None), None)


@dataclass(frozen=True)
class Layout:
    """The files of one publisher (or program) for one kind of model.

    `model_types` are the values of `model_type` in config.json with this layout. A file uses one of `spellings`; the first is
    used for writing. `read_config` maps a config.json to fields of our `VisionConfig` and `LanguageConfig`, by part;
    `write_config` is its inverse and raises `ValueError` for a model that the layout cannot express. `pairs` are pairs of
    canonical names: a file with the first must have the second. `metadata` goes into the headers of the files. `pixels` are this
    family's defaults for the fields of `VisionConfig` that preprocessor_config.json states.
    """

    name: str
    model_types: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    read_config: Callable[[dict[str, Any]], dict[str, dict[str, Any]]]
    write_config: Callable[[Any, Any], dict[str, Any]]  # encoder, decoder; None if the layout has no such part
    pairs: Pairs = ()
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)  # transformers requires this key
    pixels: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that this layout has."""
        return frozenset(part_of(canonical) for _, canonical in self.spellings[0].rows)

    def spelling_for(self, canonicals: Collection[str]) -> Spelling:
        """The first spelling with a name for all `canonicals` of this layout's parts; the first of all if there is none."""
        own = [name for name in canonicals if part_of(name) in self.parts]
        return next((s for s in self.spellings if all(s.foreign(name) for name in own)), self.spellings[0])

    def canonical(self, foreign: str) -> str | None:
        """The canonical name, None for a name that is left out; `ValueError` for a name that matches no row."""
        for spelling in self.spellings:
            if (canonical := spelling.canonical(foreign)) is not None:
                return canonical
            if spelling.reason(foreign) is not None:
                return None
        raise ValueError(f"tensor {foreign!r} is in no row of the {self.name!r} layout")

    def check_config(self, tree: dict[str, Any], ours: VisionConfig | LanguageConfig, origin: str) -> None:
        """`ValueError` naming the first field in which the config.json `tree` differs from `ours`.

        Fields in `CHOSEN`, which a run chooses, may differ.
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
    """`names[value]`; `ValueError` naming `key` if `value` is not supported here."""
    if value not in names:
        raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(map(str, names))}")
    return names[value]


def refuse_unlike(vision: VisionConfig, structure: dict[str, Any], family: str) -> None:
    """`ValueError` naming the first field in which an encoder's architecture differs from the family's."""
    for name, value in structure.items():
        if getattr(vision, name) != value:
            raise ValueError(f"this encoder has {name}={getattr(vision, name)!r}, which {family} does not have")


OPENAI_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "resize": "bicubic",
}  # fmt: skip
