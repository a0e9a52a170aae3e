"""Builds a store of conversations (for the stages `projector`, `continued` and `sft`) from LLaVA's JSON:

    python -m granvit.data.conversations conversations.json images/ OUT [--bbox-frame image|padded_square]

The file is one JSON list or has one conversation per line; it is read in a stream. Examples are BLIP-LAION-CC-SBU-558K,
Open-LLaVA-NeXT 1M and LLaVA-OneVision:

    {"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A red cup."}]}

`image` may be absent or a list of one path. A turn may have the keys `role` (user, assistant) and `content` instead. Other keys
are ignored. `<image>` must be at the start or the end of the first question; it is removed, as is white space around a text.

A box is part of a text: `[x1, y1, x2, y2]` with a decimal point, values in 0..1 (or up to 0.1 outside, if the box crosses the
edge). Data sets differ in what boxes are relative to: those of LLaVA-665K are relative to the padded square. All boxes are
rewritten relative to the image, with three decimals. If a text about an image has a box, `--bbox-frame` is required: without it
the build stops with an error.

LLaVA-OneVision's list of files (`.yaml`), with a `sampling_strategy` for each, can be given instead of one file:
`granvit/data/sources/llava.py` describes it. All its files must then have boxes in the same frame.

An invalid conversation (turns out of order, an answer missing, more than one `<image>`, a box outside the image, several images,
a video) is left out completely and listed with the reason in OUT/refused.jsonl.
"""
import argparse
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.progress import Progress

from granvit.data.build_store import add_build_arguments, read_image, read_in_threads, run_build
from granvit.data.images import decode
from granvit.data.prompts import Box, replace_boxes
from granvit.data.records import BboxFrame, Conversation, written_box
from granvit.data.sources.lines import parse_line
from granvit.data.sources.llava import Entry, conversation_files
from granvit.data.store import CONVERSATIONS, MAX_PIXELS
from granvit.data.store_writer import Item, Summary, write_items

IMAGE = "<image>"
_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}  # 0 asks, 1 answers


class _FrameNotStated(Exception):
    """Ends the build; a `ValueError` only leaves out one conversation."""


def build_conversations(
    path: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    frame: BboxFrame | None = None,
    shard_bytes: int = 256 << 20,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
    seed: int = 0,
) -> Summary:
    """Builds a store from a JSON file, or a list of them, and a folder of images (see the module's docstring).

    Invalid conversations are left out and listed in `refused.jsonl`. `seed` decides which conversations a list's rule `random`
    takes. `ValueError` if nothing is left, `path` is not a file or `images` not a directory, a JSON list is damaged, or a text
    has a box and `frame` is None.
    """
    path, images = Path(path), Path(images)
    if not path.is_file():
        raise ValueError(f"conversations {path}: no such file")
    if not images.is_dir():
        raise ValueError(f"images {images}: no such directory")
    read = partial(_read, images=images, frame=frame, max_pixels=max_pixels)
    shown = progress or Progress(disable=True)
    task = shown.add_task("conversations", total=None)
    items = read_in_threads(read, _entries(path, seed), lambda chunk: shown.advance(task, len(chunk)))
    try:
        return write_items(items, out, CONVERSATIONS, frame, shard_bytes)
    except _FrameNotStated as found:
        raise ValueError(
            f"{path}: {found}; state what this data set's boxes are relative to: --bbox-frame image, or padded_square "
            f"(LLaVA's own files)"
        ) from None


def _entries(path: Path, seed: int) -> Iterator[Entry]:
    """The conversations of a file, or of the files of a list; those have the file's name before their places."""
    for file in conversation_files(path):
        for place, tree in file.entries(seed):
            yield place if file.path == path else f"{file.path.name} {place}", tree


def _read(entry: Entry, images: Path, frame: BboxFrame | None, max_pixels: int) -> Item:
    name, tree = entry
    try:
        if isinstance(tree, bytes):
            tree = parse_line(tree)
        if not isinstance(tree, Mapping):
            raise ValueError("entry is not a mapping with conversations")
        if tree.get("id") is not None:
            name = str(tree["id"]).encode(errors="replace").decode()
        image = _image_path(tree)
        turns = _turns(tree.get("conversations"), image is not None)
        if image is None:
            return Conversation(name, 0, 0, b"", turns), []
        data = read_image(images / image)
        height, width = decode(data, max_pixels).shape[:2]
        turns = tuple((_in_image(q, width, height, frame), _in_image(a, width, height, frame)) for q, a in turns)
    except ValueError as error:
        return None, [(name, str(error))]
    except _FrameNotStated as found:
        raise _FrameNotStated(f"{name} holds {found}") from None
    return Conversation(name, width, height, data, turns), []


def _image_path(tree: Mapping) -> str | None:
    """The path of the conversation's image; None if it has none."""
    if tree.get("video"):
        raise ValueError("conversation has a video")
    image = tree.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise ValueError("conversation has more than one image")
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise ValueError("image is not a path")
    return image or None


def _turns(spoken: Any, with_image: bool) -> tuple[tuple[str, str], ...]:
    """Questions and answers without `<image>`; `ValueError` with the reason if they are invalid."""
    if not isinstance(spoken, list) or not spoken:
        raise ValueError("conversations is not a list of turns")
    texts = []
    for number, turn in enumerate(spoken):
        if not isinstance(turn, Mapping):
            raise ValueError("a turn is not a mapping")
        speaker, text = (turn.get(key) for key in (("from", "value") if "from" in turn else ("role", "content")))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise ValueError("a turn's speaker is neither human nor gpt")
        if _SPEAKERS[speaker] != number % 2:
            raise ValueError("turns do not alternate between human and gpt, the human first")
        if not isinstance(text, str):
            raise ValueError("a turn has no text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a turn's text is not valid Unicode") from None
        texts.append(text.strip())
    if len(texts) % 2:
        raise ValueError("the last question has no answer")
    if not all(texts[1::2]):
        raise ValueError("an answer is empty")
    _take_image_sign(texts, with_image)
    if not all(texts[2::2]) or not (texts[0] or with_image):
        raise ValueError("a question is empty")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _take_image_sign(texts: list[str], with_image: bool) -> None:
    """Removes `<image>` from the first question, in place: the chat template puts the image before it."""
    signs = sum(text.count(IMAGE) for text in texts)
    if not with_image:
        if signs:
            raise ValueError(f"{IMAGE} in a conversation without an image")
        return
    if signs != 1:
        raise ValueError(f"more than one {IMAGE} for one image" if signs else f"no {IMAGE} for the image")
    if IMAGE not in texts[0]:
        raise ValueError(f"{IMAGE} outside the first question")
    if not (texts[0].startswith(IMAGE) or texts[0].endswith(IMAGE)):
        raise ValueError(f"{IMAGE} inside a sentence")
    texts[0] = texts[0].replace(IMAGE, "").strip()


def _in_image(text: str, width: int, height: int, frame: BboxFrame | None) -> str:
    """The text with its boxes made relative to the image and written by `format_box`."""

    def convert(box: Box, step: float) -> Box:
        if frame is None:
            raise _FrameNotStated(f"a box, {list(box)}")
        try:
            return written_box(box, width, height, "relative", frame, step)
        except ValueError as error:
            raise ValueError(f"a text's {error}") from None

    return replace_boxes(text, convert)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="JSON", help="conversations: a JSON list, one per line, or a .yaml list of files")
    add_build_arguments(parser)
    parser.add_argument("--bbox-frame", choices=get_args(BboxFrame), help="frame that boxes in the texts are relative to")
    parser.add_argument("--seed", type=int, default=0, help="decides what the rule `random` of a list takes (default: 0)")
    options = parser.parse_args(arguments)
    counts = "{0.conversations} conversations, {0.images} of them about an image, {0.turns} turns"
    return run_build(partial(build_conversations, seed=options.seed), options, counts)


if __name__ == "__main__":
    sys.exit(main())
