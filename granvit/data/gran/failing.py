"""Notices that images fail for a reason that is not theirs, such as a broken model, a server that answers nothing of use, or a
folder that is not mounted. Otherwise a build would end with everything left out."""
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

from granvit.data.annotate.annotator import KnownImage, Result
from granvit.data.gran.open_record import LINKED, Opened, is_absent

IN_A_ROW, IN_UNIT = 50, 20  # images
_ABSENT = "name the folder that the annotations mean, mount it, or leave out the annotations of images that you do not have"
_LINKS = "images are symbolic links to files outside of the folder; name the folder they lead to, or copy or hard-link them"


@dataclass
class Failing:
    """Is told the outcome for each image of a unit of `source`, and raises `ValueError` with the source, the reason and a remedy:
    if annotators fail for one reason at `IN_A_ROW` images one after the other, or at all images of a unit, at least `IN_UNIT`; or
    if there is no file in the folder for any image of a unit, of at least `IN_UNIT`.

    Images that are left out for other reasons before they are annotated, and images that annotators have nothing to do with, do
    not count.
    """

    source: str
    annotated: int = 0
    in_a_row: int = 0
    reason: str = ""
    looked_for: int = 0
    absent: Counter[str] = field(default_factory=Counter)

    def looked(self, found: Opened | str) -> None:
        """The outcome of reading one image: the reason, if it cannot be used."""
        self.looked_for += 1
        if isinstance(found, str) and is_absent(found):
            self.absent[found] += 1

    def told(self, known: KnownImage, result: Result) -> None:
        """The outcome of annotating one image."""
        reasons = {result.failure} if result.failure is not None else {reason for _, reason in result.refused}
        added = _adds_captions(known, result)
        if not reasons and not added:
            return
        reason = reasons.pop() if len(reasons) == 1 and not added else ""
        self.annotated += 1
        self.in_a_row = (self.in_a_row + 1 if reason == self.reason else 1) if reason else 0
        self.reason = reason
        if self.in_a_row >= IN_A_ROW:
            self._stop()

    def end(self) -> None:
        """The unit has no more images."""
        if self.in_a_row == self.annotated >= IN_UNIT:
            self._stop()
        if self.absent.total() == self.looked_for >= IN_UNIT:
            reason = self.absent.most_common(1)[0][0]
            raise ValueError(
                f"sources.{self.source}.images: none of {self.looked_for} images one after the other can be read ({reason}); "
                + (_LINKS if reason == LINKED else _ABSENT)
            )

    def _stop(self) -> NoReturn:
        raise ValueError(
            f"sources.{self.source}.annotate: failed at {self.in_a_row} images one after the other: {self.reason}. Repair it and "
            "start again; what was finished before is kept. If the images are the reason, leave them out by filters"
        )


def _adds_captions(known: KnownImage, result: Result) -> bool:
    """Whether annotators wrote a caption, of the image or of a region."""
    captions = [*(region.caption for region in result.regions), result.global_caption]
    before = [region.caption for region in known.regions]
    before += [""] * (len(result.regions) - len(before))
    return any(now and now != earlier for now, earlier in zip(captions, [*before, known.global_caption], strict=True))
