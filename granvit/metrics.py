"""Scores of generated answers (SPEC section 5).

Bbox2Caption and global captions: ROUGE-L F1 (the rouge-score library, no stemming) and exact match. Caption2Bbox: ACC@IoU0.5, an
answer that does not parse counts 0.
"""
from functools import cache

from granvit.data.prompts import Box, parse_box
from granvit.stages import Task

IOU_THRESHOLD = 0.5


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer  # here: its own imports take as long as all of ours

    return RougeScorer(["rougeL"])


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 of one answer, 0..1."""
    return _rouge().score(reference, answer)["rougeL"].fmeasure


def exact_match(answer: str, reference: str) -> float:
    """1 where the texts are the same up to case and surrounding space."""
    return float(answer.strip().lower() == reference.strip().lower())


SCORES: dict[Task, tuple[str, ...]] = {
    "global": ("rouge_l", "exact_match"),
    "bbox2caption": ("rouge_l", "exact_match"),
    "caption2bbox": ("acc_iou50", "mean_iou", "unparsable"),
}


def score(task: Task, answer: str, reference: str, box: Box | None) -> dict[str, float]:
    """The scores of one answer under the names in `SCORES[task]`, each to be averaged over samples.

    `box` is the true box relative to the original image (Caption2Bbox), `reference` the true caption (the other tasks).
    """
    if task != "caption2bbox":
        return {"rouge_l": rouge_l(answer, reference), "exact_match": exact_match(answer, reference)}
    parsed = parse_box(answer)
    overlap = 0.0 if parsed is None else iou(parsed, box)
    return {"acc_iou50": float(overlap >= IOU_THRESHOLD), "mean_iou": overlap, "unparsable": float(parsed is None)}
