"""Annotators add boxes and captions to images. `annotator_class` finds one by its kind."""
import difflib
from importlib import import_module

from granvit.data.annotate.annotator import Annotator

KINDS = {
    "ocr": "ocr.Ocr",
    "detect": "detect.Detector",
    "caption": "caption.LocalCaptioner",
    "caption_endpoint": "endpoint.EndpointCaptioner",
}


def annotator_class(name: str) -> type[Annotator]:
    """The annotator of a kind. `ValueError` names the nearest kind if there is none of this name."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.3)
        raise ValueError(f"annotator {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}"))
    module, _, class_name = KINDS[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), class_name)
