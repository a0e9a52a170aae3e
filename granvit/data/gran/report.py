"""The report of a finished build, report.md and report.html: what the stores hold, beside the paper's Tables 6 and 7, what became
of every image and region, distributions, samples, and how it was made.

It is a function of the configuration and the stores: it has no times, and is the same for every number of processes.
"""
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from granvit.data.filters import Bounds, Filters
from granvit.data.gran.config import BuildConfig, SourceConfig
from granvit.data.gran.join import BUILT
from granvit.data.gran.make_unit import Counts
from granvit.data.gran.mixes import count_mix
from granvit.data.gran.plots import COLUMNS, LISTED, NAMES, draw_contact_sheet, draw_distributions, sample_cards
from granvit.data.store import Store
from granvit.page import (
    AnyCell,
    Block,
    Cell,
    Code,
    Exact,
    Folded,
    Gallery,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)

REPORT = "report.md"
SAMPLE, SEED = 12, 0  # images of a contact sheet, and the seed that draws them
REASONS = 10  # of a source, before "others"
UNFOLDED = 30  # rows
# Table 7 as printed: images and regions of a category.
TABLE_7 = {
    "UMG-41M": ("6.7M", "27.63M"),
    "LAION": ("17.19M", "54.35M"),
    "FLICKR30k": ("1269", "4351"),
    "Text Images": ("1.9M", "42.57M"),
    "Chart, Table": ("325K", "2.8M"),
    "Invoice Receipt": ("2847", "41K"),
    "Rich Text Images": ("3.3M", "56M"),
}
TABLE_7_TOTAL = ("29.51M", "183.55M")
_UNITS = {"K": 10**3, "M": 10**6}
_OF_FILTERS = {
    "shorter_side": "shorter side of the image, pixels",
    "image_aspect": "aspect ratio of the image",
    "box_aspect": "aspect ratio of a box",
    "box_area": "area of a box, pixels of the original image",
    "boxes": "boxes of an image",
    "caption_words": "words of a region's caption",
}
_OF_BOUNDS = {"above": "exclusive", "at_least": "inclusive", "below": "exclusive", "at_most": "inclusive"}


@dataclass(frozen=True)
class Built:
    """A finished store, and the counts of its sources by name."""

    store: Store
    counts: dict[str, Counts]


def read_built(config: BuildConfig, out: Path) -> dict[str, Built]:
    """The finished stores of a build by name, in the order of the configuration. `ValueError` names a store that is not there."""
    found = {}
    for name in dict.fromkeys(source.store for source in config.sources.values()):
        path = out / name
        if not (path / BUILT).exists():
            raise ValueError(f"{path / BUILT}: no such file; the build is not finished, the same command continues it")
        trees = json.loads((path / BUILT).read_text())["sources"]
        counts = {source: Counts() for source, settings in config.sources.items() if settings.store == name}
        for source, own in counts.items():
            if source in trees:
                own.add(Counts(**trees[source]))
            own.check()
        found[name] = Built(Store(path), counts)
    return found


def write_report(config: BuildConfig, out: Path) -> Path:
    """Writes report.md and report.html with their pictures into `out`, where the stores of `config` are finished. Returns the
    path of report.md. `ValueError` names a store that is not there or damaged."""
    stores = read_built(config, out)
    counts = {source: stores[settings.store].counts[source] for source, settings in config.sources.items()}
    blocks = [
        *_summary(stores),
        *_table_6(config, counts),
        *_table_7(config, counts),
        *_mixes(config, stores),
        *_accounting(counts),
        *_distributions(config, counts, out),
        *_samples(stores, out),
        *_how(config),
    ]
    title = "Region data from public sources"
    blocks.insert(0, Heading(1, title))
    path = out / REPORT
    path.write_text(to_markdown(blocks))
    path.with_suffix(".html").write_text(to_html(title, blocks, out))
    return path


def _number(value: int) -> str:
    return f"{value:,}"


def _share(part: int, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _summary(stores: Mapping[str, Built]) -> Iterator[Block]:
    yield Text("An image of a store has captions of its regions, of the whole, or both. docs/data.md in GranViT's repository "
               "describes a store's files and how a training uses them.")  # fmt: skip
    rows = []
    for name, built in stores.items():
        size = sum(path.stat().st_size for path in built.store.path.iterdir() if path.is_file())
        rows.append([f"{name}/", *map(_number, (built.store.records, built.store.regions, built.store.globals, size))])
    yield Table(("store, beside this file", "images", "regions", "global captions", "bytes"), rows)


def _table_6(config: BuildConfig, counts: Mapping[str, Counts]) -> Iterator[Block]:
    """Table 6: every source; then the sums of the data types and of all."""
    with_paper = any(source.paper is not None for source in config.sources.values())
    groups = {kind: [name for name, source in config.sources.items() if source.data_type == kind] for kind in NAMES}
    rows = [_row_6(NAMES[kind], name, [config.sources[name]], [counts[name]]) for kind, names in groups.items() for name in names]
    groups["all"] = list(config.sources)
    for kind, names in groups.items():
        if names and (kind == "all" or len(names) < len(config.sources)):
            title = "all" if kind == "all" else NAMES[kind]
            rows.append(_row_6(title, "TOTAL", [config.sources[name] for name in names], [counts[name] for name in names]))
    yield Heading(2, "Sources (the paper's Table 6)")
    if with_paper:
        yield Text("The paper's numbers are those after its filters. A share is ours divided by the paper's.")
    yield _with_paper("data source", rows, with_paper)


def _with_paper(what: str, rows: Sequence[Sequence[str]], with_paper: bool) -> Table:
    """A table in the form of Tables 6 and 7, with or without the columns of the paper's numbers."""
    header = ("data type", what, "#images", "#regions", "paper, #images", "paper, #regions", "share, images", "share, regions")
    columns = len(header) if with_paper else 4
    return Table(header[:columns], [row[:columns] for row in rows])


def _row_6(kind: str, name: str, sources: Sequence[SourceConfig], counts: Sequence[Counts]) -> list[str]:
    images, regions = sum(own.images_written for own in counts), sum(own.regions_written for own in counts)
    papers = [source.paper for source in sources if source.paper is not None]
    row = [kind, name, _number(images), _number(regions)]
    if len(papers) < len(sources):
        return [*row, "-", "-", "-", "-"]
    paper_images, paper_regions = sum(paper.images for paper in papers), sum(paper.regions for paper in papers)
    return [*row, _number(paper_images), _number(paper_regions), _share(images, paper_images), _share(regions, paper_regions)]


def _table_7(config: BuildConfig, counts: Mapping[str, Counts]) -> Iterator[Block]:
    """Table 7, if sources have categories."""
    rows, total = [], Counts()
    for category, printed in TABLE_7.items():
        own = Counts()
        names = [name for name, source in config.sources.items() if source.category == category]
        for name in names:
            own.add(counts[name])
        total.add(own)
        kinds = dict.fromkeys(NAMES[config.sources[name].data_type] for name in names)
        if names:
            rows.append(_row_7(" and ".join(kinds), category, own, printed))
    if not rows:
        return
    rows.append(_row_7("all", "TOTAL", total, TABLE_7_TOTAL))
    yield Heading(2, "Categories (the paper's Table 7)")
    yield Text("The paper's numbers as it prints them. Its regions of Text Images and of Rich Text Images fit its Table 6 only "
               "if they are exchanged.")  # fmt: skip
    yield _with_paper("data source", rows, True)


def _row_7(kind: str, name: str, own: Counts, printed: tuple[str, str]) -> list[str]:
    numbers = own.images_written, own.regions_written
    shares = [_share(count, _value(text)) for count, text in zip(numbers, printed, strict=True)]
    return [kind, name, *map(_number, numbers), *printed, *shares]


def _value(printed: str) -> float:
    """The number that Table 7 prints: 27.63M is 27,630,000."""
    return float(Fraction(printed[:-1]) * _UNITS[printed[-1]]) if printed[-1] in _UNITS else float(printed)


def _mixes(config: BuildConfig, stores: Mapping[str, Built]) -> Iterator[Block]:
    """The questions of each mix, if the configuration has some."""
    if not config.mixes:
        return
    yield Heading(2, "Mixes")
    yield Text("The questions that a stage asks with a mix as its data.sources, exactly as many. Its seed decides which ones "
               "they are; no record is copied.")  # fmt: skip
    rows, missing = [], []
    for name, mix in config.mixes.items():
        counted = count_mix(mix, {store: built.store for store, built in stores.items()})
        missing += [f"{name} asks for {line}." for line in counted.missing]
        for store, counts in counted.counts.items():
            rows += [[f"mixes/{name}.yaml", store, task, _number(count), str(mix.draw)] for task, count in counts.items()]
    yield Table(("mix, beside this file", "store", "task", "questions", "seed"), rows)
    if missing:
        yield Text("The stores have fewer questions than these mixes ask for; they take all that are there:")
        yield Items(missing)


def _accounting(counts: Mapping[str, Counts]) -> Iterator[Block]:
    yield Heading(2, "What became of every image and region")
    yield Text("Of images: read = written + dropped. Of regions: read + found by annotators = written + dropped. A region of an "
               "image that was left out is dropped under the image's reason. Re-encoded are images beyond the limits of the "
               "configuration; all others have the bytes of their file.")  # fmt: skip
    total = Counts()
    for own in counts.values():
        total.add(own)
    rows = [_flow(name, own) for name, own in counts.items()]
    if len(counts) > 1:
        rows.append(_flow("TOTAL", total))
    yield Table(
        ("source", "images read", "= written", "+ dropped", "re-encoded", "regions read", "+ found", "= written", "+ dropped",
         "global captions"), rows,
    )  # fmt: skip
    dropped: tuple[tuple[str, str, Callable[[Counts], Counter[str]], Callable[[Counts], int]], ...] = (
        ("Images dropped", "of images read", lambda own: own.images_dropped, lambda own: own.records_read),
        ("Regions dropped", "of regions read and found", lambda own: own.regions_dropped,
         lambda own: own.regions_read + own.regions_found),
        ("Global captions dropped by themselves", "of all", lambda own: own.globals_dropped,
         lambda own: own.globals_written + own.globals_dropped.total()),
    )  # fmt: skip
    for title, of, reasons, whole in dropped:
        lines = [(name, *line, whole(own)) for name, own in counts.items() for line in _bounded(reasons(own))]
        if not lines:
            yield Text(f"{title}: none.")
            continue
        yield Heading(3, title)
        shown = [[name, reason, _number(count), _share(count, of_all)] for name, reason, count, of_all in lines]
        line = f"{_number(sum(count for _, _, count, _ in lines))} in all, by source and reason"
        yield Folded(line, Table(("source", "reason", "number", of), shown), len(shown) <= UNFOLDED)


def _flow(name: str, own: Counts) -> list[str]:
    numbers = (own.records_read, own.images_written, own.images_dropped.total(), own.reencoded, own.regions_read,
               own.regions_found, own.regions_written, own.regions_dropped.total(), own.globals_written)  # fmt: skip
    return [name, *map(_number, numbers)]


def _bounded(reasons: Counter[str]) -> list[tuple[str, int]]:
    """Reasons with their counts, the most frequent first; those after the first `REASONS` are summed."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[REASONS:]
    return ordered[:REASONS] + ([(f"others ({len(rest)} reasons)", sum(count for _, count in rest))] if rest else [])


def _distributions(config: BuildConfig, counts: Mapping[str, Counts], out: Path) -> Iterator[Block]:
    histograms = {}
    for kind in NAMES:
        total = Counts()
        for name, source in config.sources.items():
            if source.data_type == kind:
                total.add(counts[name])
        if total.images_written:
            histograms[kind] = total.histograms
    draw_distributions(histograms, out / "report_distributions.png")
    yield Heading(2, "Distributions")
    yield Picture("report_distributions.png", "Histograms of boxes per image, area and aspect ratio of boxes, words per caption",
                  "Of what was written, in percent of the images or boxes of the data type. Areas and aspect ratios: a bin "
                  "includes its lower bound and excludes its upper one. Areas are in pixels of the stored image.")  # fmt: skip


def _samples(stores: Mapping[str, Built], out: Path) -> Iterator[Block]:
    yield Heading(2, "Samples")
    yield Text(f"Images of each store at random, at most {SAMPLE} (seed {SEED}). Of an image with more than {LISTED} boxes, "
               f"{LISTED} at random have numbers and captions, the others thin grey outlines.")  # fmt: skip
    for name, built in stores.items():
        cards = sample_cards(built.store, SAMPLE, SEED)
        file = f"report_sample_{name}.jpg"
        draw_contact_sheet(cards, out / file)
        yield Heading(3, name)
        yield Gallery(file, f"{len(cards)} images of {name} with numbered boxes and their captions", cards, COLUMNS)


def _how(config: BuildConfig) -> Iterator[Block]:
    yield Heading(2, "How it was made")
    yield Code("python scripts/build_gran.py --config CONFIGURATION")
    yield Text("with a configuration that has the sources below. The number of processes does not change the result.")
    rows = [[name, source.store, _settings(source.read), Cell(source.where, source.licence) if source.where else ""]
            for name, source in config.sources.items()]  # fmt: skip
    yield Table(("source", "store", "read by", "where to get it (its licence)"), rows)
    yield Text("What was done to the images of the sources, in this order:")
    versions = _versions(config)
    treated: dict[tuple[str, ...], list[str]] = {}
    for name, source in config.sources.items():
        treated.setdefault(_treatment(source, versions), []).append(name)
    cells: list[list[AnyCell]] = [[", ".join(names), *map(Exact, texts)] for texts, names in treated.items()]
    yield Table(("sources", "kept captions and annotators", "filters", "duplicates"), cells)
    limits = config.image
    yield Text(f"Images of more than {limits.max_side} pixels on the longer side or {_number(limits.max_bytes)} bytes are "
               f"re-encoded as JPEG with quality {limits.quality}. Images of more than {_number(config.max_pixels)} pixels are "
               f"refused. Units of {_number(config.unit_images)} images, shards of {config.shard_megabytes} MB.")  # fmt: skip
    seeds = [f"samples above {SEED}", *(f"mix {name} {mix.draw}" for name, mix in config.mixes.items())]
    yield Text(f"Seeds: {', '.join(seeds)}. Annotating, filtering and leaving out duplicates "
               "draw nothing at random.")  # fmt: skip


def _settings(tree: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in tree.items())


def _versions(config: BuildConfig) -> dict[str, str]:
    """The version of each annotator, by its entry in the configuration: a version is computed from the model's files."""
    found: dict[str, str] = {}
    for source in config.sources.values():
        for entry, annotator in zip(source.annotate, source.annotators().annotators, strict=True):
            if _settings(entry) not in found:
                found[_settings(entry)] = annotator.version
    return found


def _treatment(source: SourceConfig, versions: Mapping[str, str]) -> tuple[str, str, str]:
    """Captions and annotators, filters, duplicates: in words, a line each."""
    kept = [word for word, keeps in (("region", source.keep_region_captions), ("global", source.keep_global_captions)) if keeps]
    lines = [f"{' and '.join(kept)} captions of the source are kept" if kept else "no caption of the source is kept"]
    lines += [f"{_settings(entry)}, version {versions[_settings(entry)]}" for entry in source.annotate]
    same = [word for word, on in (("equal pixels", source.duplicates.exact), ("looking alike", source.duplicates.near)) if on]
    return ";\n".join(lines), filters_in_words(source.filters), f"left out: {', '.join(same)}" if same else "kept"


def filters_in_words(filters: Filters) -> str:
    """The bounds of all filters, a line each, with the words inclusive and exclusive."""
    lines = [f"{text}: {_bounds_in_words(getattr(filters, name))}" for name, text in _OF_FILTERS.items()]
    repeated = {"keep": "kept", "drop": "dropped"}[filters.repeated_captions]
    return ";\n".join([*lines, f"regions with a repeated caption: {repeated}"])


def _bounds_in_words(bounds: Bounds) -> str:
    limits = [f"{name.replace('_', ' ')} {getattr(bounds, name)} ({kind})" for name, kind in _OF_BOUNDS.items()
              if getattr(bounds, name) is not None]  # fmt: skip
    return " and ".join(limits) or "any"
