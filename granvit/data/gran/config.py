"""The configuration of a build (configs/gran29m.yaml): sources with their readers, annotators and filters, and where they go."""
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError, model_validator

from granvit.config import DataSection, read_yaml, validate
from granvit.data.annotate.annotator import Annotator, Chain
from granvit.data.filters import Filters
from granvit.data.sources import read_class
from granvit.data.sources.annotated import Reader
from granvit.models import Strict
from granvit.stages import RegionTask

RESERVED = ("read", "units", "mixes")  # folders of a build that are no stores


class Duplicates(Strict):
    """`exact`: images with equal pixels; `near`: images that look alike (granvit/data/gran/duplicates.py). The first one in the
    order of the configuration stays."""

    exact: bool = True
    near: bool = True


class ImageLimits(Strict):
    """Images within these limits keep the bytes of their file. Others are scaled so that the longer side is `max_side`, and
    encoded as JPEG with `quality`."""

    max_side: int = Field(4096, gt=0)
    max_bytes: int = Field(16 << 20, gt=0)
    quality: int = Field(95, ge=1, le=100)


# The rows of the paper's Table 7.
Category = Literal[
    "UMG-41M", "LAION", "FLICKR30k", "Text Images", "Chart, Table", "Invoice Receipt", "Rich Text Images"
]  # fmt: skip


class Published(Strict):
    """What the paper's Table 6 states of a source, after its filters."""

    images: int = Field(ge=0)
    regions: int = Field(ge=0)


class SourceConfig(Strict):
    """One source.

    `read` has the key `format` (granvit/data/sources/__init__.py) and the fields of its reader; `images` is the folder that image
    paths are relative to (absent where the images come with the annotations). `store` is the store that the source goes into.
    `annotate` are annotators, one after the other, each with the key `kind` and its fields. `keep_captions` `regions` or `global`
    false leaves out captions of the source, so that annotators write them. `paper`, `data_type`, `category`, `where`, `licence`
    are for readers of the configuration and for the report.
    """

    store: str
    read: dict[str, Any]
    images: str | None = None
    annotate: tuple[dict[str, Any], ...] = ()
    keep_region_captions: bool = True
    keep_global_captions: bool = True
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    data_type: Literal["natural", "ocr"] = "natural"
    category: Category | None = None
    paper: Published | None = None
    where: str = ""
    licence: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "SourceConfig":
        self.reader()
        self.annotators()
        return self

    def reader(self) -> Reader:
        """The reader with its fields. `ValueError` names an unknown format or field."""
        given = dict(self.read)
        name = given.pop("format", None)
        if not isinstance(name, str):
            raise ValueError("read: has no format")
        return _built(read_class(name), given, f"read: format {name}")

    def annotators(self) -> Chain:
        """The annotators in their order. `ValueError` names an unknown kind or field."""
        from granvit.data.annotate import annotator_class  # imported here: the readers alone do not need it

        made: list[Annotator] = []
        for number, entry in enumerate(self.annotate):
            given = dict(entry)
            kind = given.pop("kind", None)
            made.append(_built(annotator_class(str(kind)), given, f"annotate.{number}: kind {kind}"))
        return Chain(tuple(made))


def _built(kind: type, given: Mapping[str, Any], origin: str) -> Any:
    """An object of a dataclass with these fields. `ValueError` names a field that it does not have, or a value that does not
    fit."""
    names = {field.name for field in fields(kind) if field.init}
    if unknown := [key for key in given if key not in names]:
        raise ValueError(f"{origin}: unknown key {unknown[0]!r}; it has {', '.join(sorted(names))}")
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


Amount = Literal["all"] | NonNegativeInt


class MixConfig(Strict):
    """A mix of questions (granvit/data/gran/mixes.py).

    `questions` states for each task how many are asked: a number or `all` for each store, or for all stores together; then a
    number is divided over them in proportion to the questions that they have. `total` or `fraction` then reduces all counts in
    proportion: to so many questions in all, or to a part. `draw` is the seed that chooses the questions.
    """

    questions: dict[RegionTask, Amount | dict[str, Amount]]
    total: int | None = Field(None, gt=0)
    fraction: float = Field(1.0, gt=0, le=1)
    draw: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_of_both(self) -> "MixConfig":
        if self.total is not None and self.fraction != 1:
            raise ValueError("total and fraction both reduce the mix; leave one of them out")
        return self


class BuildConfig(Strict):
    """A build: `out` is its directory, `sources` by name in their order, `mixes` by name. `unit_images` is the number of images
    of a unit of work where a source's annotations do not hold its images. `stages` are configurations of stages: the tokens of
    the stores are counted for their tokenizers, so that a training starts at once."""

    out: str
    sources: dict[str, SourceConfig]
    mixes: dict[str, MixConfig] = Field(default_factory=dict)
    stages: tuple[str, ...] = ()
    unit_images: int = Field(2000, gt=0)
    shard_megabytes: int = Field(256, gt=0)
    max_pixels: int = Field(DataSection.model_fields["max_pixels"].default, gt=0)
    image: ImageLimits = ImageLimits()

    def annotators(self) -> dict[str, Chain]:
        """The annotators of each source. Sources with the same entry share one object, and so its model."""
        made: dict[str, Annotator] = {}
        chains = {}
        for name, source in self.sources.items():
            entries = [json.dumps(entry, sort_keys=True, default=str) for entry in source.annotate]
            own = zip(entries, source.annotators().annotators, strict=True)
            chains[name] = Chain(tuple(made.setdefault(entry, annotator) for entry, annotator in own))
        return chains

    @model_validator(mode="after")
    def _names(self) -> "BuildConfig":
        stores = {source.store for source in self.sources.values()}
        for name in (*self.sources, *stores, *self.mixes):
            if not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"{name!r} cannot be the name of a source, store or mix: it becomes the name of a file")
        if taken := stores & set(RESERVED):
            raise ValueError(f"{min(taken)!r} cannot be the name of a store: a build has a folder of this name already")
        if not self.sources:
            raise ValueError("sources: names none")
        for name, mix in self.mixes.items():
            named = {store for amount in mix.questions.values() if isinstance(amount, dict) for store in amount}
            if unknown := sorted(named - stores):
                there = ", ".join(sorted(stores))
                raise ValueError(f"mixes.{name}: no source goes into the store {unknown[0]!r}; there are {there}")
        return self


def read_build(path: Path) -> BuildConfig:
    """Reads a build's configuration. `ValueError` names the file, every offending key and the nearest valid one."""
    return validate(BuildConfig, read_yaml(path), str(path))
