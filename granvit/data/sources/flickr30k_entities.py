"""Flickr30k Entities (https://github.com/BryanPlummer/flickr30k_entities, `annotations.zip`): phrases of sentences with boxes.

`Annotations/36979.xml` has `filename`, `size` and `object`s. An object has one or several `name`s, the ids of the entities that
it shows, and either `bndbox` (`xmin`, `ymin`, `xmax`, `ymax`) or `nobndbox` and `scene`. An entity can have several boxes.
`Sentences/36979.txt` has five sentences, one per line, with the ids and types of entities:

    [/EN#283585/people A young child] is wearing [/EN#283587/clothing blue goggles] .

Boxes are the first and last pixels, counted from 1 (the data set's own tools subtract 1): their edges are `xmin - 1`, `ymin - 1`,
`xmax`, `ymax`.
"""
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import need_folder
from granvit.data.sources.polygons import whole_size

_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\[\]]+)\]")
_NOT_VISUAL = "0"  # the id of all phrases that name nothing to see


@dataclass(frozen=True)
class Flickr30kEntities:
    """Phrases as regions: one for each phrase of each sentence and each box of the phrase's entity.

    Phrases of entities without a box (`nobndbox`, `scene`) give no region. The global caption is sentence number
    `global_sentence`, from 0; None for no global caption. Both folders are given: `annotations` and `sentences`.
    """

    annotations: str | Path
    sentences: str | Path
    global_sentence: int | None = None

    def parts(self) -> Sequence[str]:
        """One part, the name of the folder of annotations. `ValueError` if a folder is missing."""
        need_folder(self.sentences, "sentences")
        return (need_folder(self.annotations, "annotations").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of the files' names. `ValueError` if a file is an XML file of another format."""
        annotations, sentences = Path(self.annotations), Path(self.sentences)
        with_boxes = {path.stem for path in annotations.glob("*.xml")}
        if not with_boxes:
            raise ValueError(f"annotations {annotations}: has no .xml file; name the folder Annotations of Flickr30k Entities")
        with_sentences = {path.stem for path in sentences.glob("*.txt")}
        for name in sorted(with_boxes | with_sentences):
            try:
                if name not in with_boxes:
                    raise _Unreadable("sentences without a file of annotations")
                if name not in with_sentences:
                    raise _Unreadable("annotations without a file of sentences")
                yield self._annotated(name, annotations / f"{name}.xml", sentences / f"{name}.txt")
            except _Unreadable as error:
                yield Refused(name, str(error))

    def _annotated(self, name: str, annotations: Path, sentences: Path) -> Annotated:
        root = _parse(annotations)
        image = (root.findtext("filename") or "").strip()
        if not image:
            raise _Unreadable("annotations have no filename")
        refused: list[tuple[str, str]] = []
        boxes = _boxes(root, refused)
        regions, texts = [], []
        for number, (text, phrases) in enumerate(_sentences(sentences)):
            texts.append(text)
            if "[/EN#" in text:
                refused.append((f"sentence {number}", "sentence has a damaged phrase"))
            for entity, phrase in phrases:
                if entity not in boxes and entity != _NOT_VISUAL:
                    refused.append((f"entity {entity}", "entity of the phrase has no entry"))
                regions += [RawRegion(box, phrase) for box in boxes.get(entity, ())]
        chosen = self.global_sentence
        return Annotated(
            id=name,
            image=image,
            regions=tuple(regions),
            global_caption=texts[chosen] if chosen is not None and 0 <= chosen < len(texts) else None,
            size=whole_size(*(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))),
            refused=tuple(refused),
        )


class _Unreadable(Exception):
    """An image cannot be read; the message is the reason. A `ValueError` would end the part."""


def _parse(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError):  # the last two: unknown encodings
        raise _Unreadable("annotations are not valid XML") from None
    if root.tag != "annotation":
        raise ValueError(f"{path}: is not an annotation of Flickr30k Entities: its element is {root.tag}, not annotation")
    return root


def _boxes(root: ElementTree.Element, refused: list[tuple[str, str]]) -> dict[str, list[tuple[float, float, float, float]]]:
    """The boxes of each entity, an empty list for one that has none. Objects that cannot be read are added to `refused`."""
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for place, thing in enumerate(root.iter("object")):
        entities = [(name.text or "").strip() for name in thing.iter("name")]
        if not any(entities):
            refused.append((f"object {place}", "object has no name"))
        for entity in entities:
            boxes.setdefault(entity, [])
        if thing.find("bndbox") is None:
            continue
        edges = [_number(thing.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = edges
        if x1 is None or y1 is None or x2 is None or y2 is None:
            refused.append((f"object {place}", "box is not four numbers"))
            continue
        for entity in entities:
            boxes[entity].append((x1 - 1, y1 - 1, x2, y2))
    return boxes


def _sentences(path: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The text of each sentence, and its phrases with the ids of their entities."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise _Unreadable("sentences are not UTF-8") from None
    for line in lines:
        if line.strip():
            yield _PHRASE.sub(r"\3", line).strip(), [(match[1], match[3].strip()) for match in _PHRASE.finditer(line)]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
