"""Builds a region store from a JSON-lines file and a folder of images:

    python -m granvit.data.build_store annotations.jsonl images/ OUT [--bbox-frame padded_square] [--boxes absolute]

Each line describes one image. `id` (default: the image's path), `global` and `regions` are optional, other keys are ignored:

    {"image": "a.jpg", "id": "a", "global": "A desk ...", "regions": [{"box": [0.1, 0.2, 0.5, 0.9], "caption": "a red cup"}]}

Invalid lines, images, regions and captions are left out and listed in OUT/refused.jsonl, one `{"what": ..., "reason": ...}` per
line. The file exists only if something was left out.

    python -m granvit.data.build_store --verify STORE

reads all files of a store of any kind and names each that is not the one that was written.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

from rich.progress import Progress

from granvit.data.records import BboxFrame, BoxUnit, make_record
from granvit.data.sources.jsonl import described
from granvit.data.sources.lines import parse_line
from granvit.data.store import MAX_PIXELS, REGIONS, differing_files, stated_bytes
from granvit.data.store_writer import REFUSED, Item, Summary, write_items

Input = TypeVar("Input")


def read_in_threads(
    read: Callable[[Input], Item], inputs: Iterator[Input], done: Callable[[list[Input]], None]
) -> Iterator[Item]:
    """Yields `read(input)` for every input, in order; calls `done` with each finished chunk. At most 64 results are in memory."""
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(inputs, 64)):
            yield from pool.map(read, chunk)
            done(chunk)


def read_image(path: Path) -> bytes:
    """An image file's bytes; `ValueError` with a reason that does not name the file, so that equal reasons can be counted."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"image file cannot be read ({type(error).__name__})") from None


def _read_line(numbered: tuple[int, bytes], images: Path, unit: BoxUnit, frame: BboxFrame, max_pixels: int) -> Item:
    number, line = numbered
    name = f"line {number}"
    try:
        tree = parse_line(line)
        name, image = described(tree)
        data = read_image(images / image)
        record, refused = make_record(
            name, data, tree.get("global"), tree.get("regions") or [], unit=unit, frame=frame, max_pixels=max_pixels
        )
    except ValueError as error:
        return None, [(name, str(error))]
    return record, [(f"{name} {part}", reason) for part, reason in refused]


def build_store(
    jsonl: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    frame: BboxFrame = "image",
    unit: BoxUnit = "relative",
    shard_bytes: int = 256 << 20,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> Summary:
    """Builds a store from a JSON-lines file and a folder of images (see the module's docstring).

    Invalid input is left out and listed in `refused.jsonl`. `ValueError` if nothing is left, `jsonl` is not a file or `images`
    is not a directory.
    """
    jsonl, images = Path(jsonl), Path(images)
    if not jsonl.is_file():
        raise ValueError(f"annotations {jsonl}: no such file")
    if not images.is_dir():
        raise ValueError(f"images {images}: no such directory")
    read = partial(_read_line, images=images, unit=unit, frame=frame, max_pixels=max_pixels)
    shown = progress or Progress(disable=True)
    task = shown.add_task("images", total=jsonl.stat().st_size)
    with open(jsonl, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        items = read_in_threads(read, lines, lambda chunk: shown.advance(task, sum(len(line) for _, line in chunk)))
        return write_items(items, out, REGIONS, frame, shard_bytes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verify", action=_Verify, type=Path, metavar="STORE", help="check the files of a store, and exit")
    parser.add_argument("source", metavar="JSONL", help="annotations, one image per line")
    add_build_arguments(parser)
    frame_help = "frame that boxes are relative to (default: image)"
    parser.add_argument("--bbox-frame", choices=get_args(BboxFrame), default="image", help=frame_help)
    parser.add_argument("--boxes", choices=get_args(BoxUnit), default="relative", help="0..1 or pixels (default: relative)")
    options = parser.parse_args(arguments)
    counts = "{0.images} images, {0.regions} regions, {0.globals} global captions"
    return run_build(partial(build_store, unit=options.boxes), options, counts)


class _Verify(argparse.Action):
    """Ends the command with the status of `verify`: like `--help`, the option needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None):
        parser.exit(verify(values))


def verify(store: Path) -> int:
    """Checks all files of a store against the hashes in its manifest and prints which differ. Returns the exit status: 0, or 2 if
    a file differs or the store has no hashes."""
    differing = 0
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("bytes", total=(total := stated_bytes(store)))
            for name, reason in differing_files(store, lambda count: progress.advance(task, count)):
                differing += 1
                print(f"{store / name}: {reason}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if differing:
        print(f"error: {store}: damaged files: {differing}; copy them again or rebuild the store", file=sys.stderr)
        return 2
    print(f"{store}: all files have the contents that were written ({total:,} bytes)")
    return 0


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all commands that build a store share, except the first, `source`, and `--bbox-frame`."""
    parser.add_argument("images", metavar="IMAGES", help="folder that the annotations' image paths are relative to")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--shard-size", type=int, default=256, metavar="MB", help="close a shard at this size (default: 256)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger images (default: %(default)s)")


def run_build(build: Callable[..., Summary], options: argparse.Namespace, counts: str) -> int:
    """Builds a store with the options of the command line; returns the exit status.

    Prints the counts (a format string for the summary) and what was refused: counts by reason, the first items by name, and the
    file that lists all if there are more. An error is printed in one line.
    """
    try:
        with Progress(transient=True) as progress:
            summary = build(
                *(options.source, options.images, options.out),
                frame=options.bbox_frame,
                shard_bytes=options.shard_size << 20,
                max_pixels=options.max_pixels,
                progress=progress,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {counts.format(summary)}")
    for reason, count in summary.refused.most_common():
        print(f"  refused {count}: {reason}")
    for line in summary.first_refused:
        print(f"    {line}")
    if (total := summary.refused.total()) > len(summary.first_refused):
        print(f"    all {total}: {Path(options.out) / REFUSED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
