"""Readers of public region data, one file per format. `read_class` finds a reader by the name of its format."""
from granvit.data.named_class import named_class
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
    return named_class("format", name, FORMATS, __name__)
