"""Readers of public region data, one file per format. `read_class` finds a reader by the name of its format."""
import difflib
from importlib import import_module

from granvit.data.sources.annotated import Reader

FORMATS = {
    "coco": "coco.Coco",
    "coco_results": "coco.CocoResults",
    "cord": "cord.Cord",
    "cord_parquet": "cord.CordParquet",
    "docbank": "docbank.DocBank",
    "flickr30k_entities": "flickr30k_entities.Flickr30kEntities",
    "folder": "folder.Folder",
    "grit": "grit.Grit",
    "jsonl": "jsonl.JsonLines",
    "paddleocr": "paddleocr.PaddleOcr",
    "poie": "quads.Poie",
    "quads": "quads.Quads",
    "refcoco": "refcoco.RefCoco",
    "refcoco_images": "refcoco.RefCocoImages",
    "refcoco_table": "refcoco.RefCocoTable",
    "tar": "tar.Tar",
    "textocr": "textocr.TextOcr",
    "umg": "umg.Umg",
    "visual_genome": "visual_genome.VisualGenome",
    "voc": "pubtables.Voc",
}


def read_class(name: str) -> type[Reader]:
    """The reader of a format. `ValueError` names the nearest format if there is none of this name."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.3)
        raise ValueError(f"format {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"))
    module, _, class_name = FORMATS[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), class_name)
