"""Annotators add boxes and captions to images. `annotator_class` finds one by its kind."""
from granvit.data.annotate.annotator import Annotator
from granvit.data.named_class import named_class

KINDS = {
    "ocr": "ocr.Ocr",
    "detect": "detect.Detector",
    "caption": "caption.LocalCaptioner",
    "caption_endpoint": "endpoint.EndpointCaptioner",
}


def annotator_class(name: str) -> type[Annotator]:
    """The annotator of a kind. `ValueError` names the nearest kind if there is none of this name."""
    return named_class("annotator", name, KINDS, __name__)
