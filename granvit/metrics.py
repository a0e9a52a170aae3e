"""Scores of generated answers; ROUGE-L and ACC@IoU0.5 are those of the paper's Fig. 4.

Bbox2Caption and global captions: ROUGE-L and exact match. Caption2Bbox: ACC@IoU0.5; an answer that is not a box counts as 0.

ROUGE-L is the F1 score of the longest common subsequence of tokens (beta 1; COCO's caption evaluation uses beta 1.2, which gives
other values), computed by the rouge-score library without stemming. `rouge_l` uses tokens of any script (`words`).
`rouge_l_ascii` uses the library's own tokens, which are runs of a-z and 0-9: captions in other scripts have no such token and
score 0. For ASCII captions with at least one letter or digit both scores are equal.
"""
import re
import unicodedata
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


# Scripts without spaces between words: Thai and Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """The tokens of a caption in any script. Texts that differ only in case, Unicode composition or width have equal tokens.

    The text is normalised to NFKC and case-folded. A token is a run of letters and digits with their combining marks; in scripts
    without spaces each character with its marks is one token. Punctuation and symbols separate tokens. If the text has no letter
    and no digit, each punctuation character or symbol is a token.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = []
    signs: list[str] = []
    last, joins = None, False  # the list whose last token gets a mark; whether a letter continues that token
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":  # invisible: joiners and direction marks
            continue
        if kind[0] == "M" and last is not None:
            last[-1] += character
        elif kind[0] in "LNM":
            alone = _UNSPACED.match(character) is not None
            if joins and not alone:
                found[-1] += character
            else:
                found.append(character)
            last, joins = found, not alone
        elif kind[0] == "Z" or kind == "Cc":
            last, joins = None, False
        else:
            signs.append(character)
            last, joins = signs, False
    return found or signs


class _Words:
    """`words` as a tokenizer object for rouge-score."""

    tokenize = staticmethod(words)


@cache
def _rouge(tokenizer: _Words | None):
    from rouge_score.rouge_scorer import RougeScorer  # imported late: its imports take as long as all of the core's

    return RougeScorer(["rougeL"], tokenizer=tokenizer)


_WORDS = _Words()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 of one answer over `words`, 0..1; 1 if neither text has a token."""
    if not words(answer) and not words(reference):
        return 1.0
    return _rouge(_WORDS).score(reference, answer)["rougeL"].fmeasure


def rouge_l_ascii(answer: str, reference: str) -> float:
    """ROUGE-L F1 of one answer with rouge-score's own tokens, runs of a-z and 0-9; 0 if either text has none."""
    return _rouge(None).score(reference, answer)["rougeL"].fmeasure


def exact_match(answer: str, reference: str) -> float:
    """1 if the texts are equal up to case and surrounding white space, else 0."""
    return float(answer.strip().lower() == reference.strip().lower())


CAPTION_SCORES = {"rouge_l": rouge_l, "rouge_l_ascii": rouge_l_ascii, "exact_match": exact_match}
SCORES: dict[Task, tuple[str, ...]] = {
    "global": tuple(CAPTION_SCORES),
    "bbox2caption": tuple(CAPTION_SCORES),
    "caption2bbox": ("acc_iou50", "mean_iou", "unparsable"),
}


def score(task: Task, answer: str, reference: str, box: Box | None) -> dict[str, float]:
    """The scores of one answer, named as in `SCORES[task]`. Callers average each over the samples.

    `box` is the true box relative to the original image (Caption2Bbox), `reference` the true caption (the other tasks).
    """
    if task != "caption2bbox":
        return {name: function(answer, reference) for name, function in CAPTION_SCORES.items()}
    assert box is not None
    parsed = parse_box(answer)
    overlap = 0.0 if parsed is None else iou(parsed, box)
    return {"acc_iou50": float(overlap >= IOU_THRESHOLD), "mean_iou": overlap, "unparsable": float(parsed is None)}
