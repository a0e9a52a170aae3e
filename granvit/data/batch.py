"""Fixed-shape arrays that a step consumes, and the shared-prefix packer that makes them.

Layout letters: B rows, K regions per row, N patches, S sequence, A supervised positions, R image side, r crop side.
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """One image per row, up to K region questions and one global question about it (DESIGN, "A batch").

    Segment 0 is the prefix (system turn, user header, image tokens), 1.. are questions with their answers, -1 is padding. A
    token may attend to a key iff the key is not later in the row and its segment is 0 or the token's own. Positions
    restart after the prefix in every segment.
    """

    pixels_B3RR: np.ndarray  # uint8, RGB in the padded frame; normalised inside the graph
    image_weights_B: np.ndarray  # float32: 1 an image row; 0 a text row, whose image positions hold ordinary token ids
    token_ids_BS: np.ndarray  # int32; the id at an image position of an image row is replaced by an image feature
    positions_BS: np.ndarray  # int32
    segments_BS: np.ndarray  # int32
    image_positions_BN: np.ndarray  # int32, where image token n stands in its row
    answer_positions_BA: np.ndarray  # int32, the position whose output predicts the target (0 where the weight is 0)
    answer_targets_BA: np.ndarray  # int32
    answer_weights_BA: np.ndarray  # float32, 1 supervised, 0 not
    boxes_BK4: np.ndarray  # float32, xyxy in the padded frame, 0..1; the boxes that are distilled
    box_weights_BK: np.ndarray  # float32, 1 valid, 0 not
    crops_BK3rr: np.ndarray  # uint8, the teacher's views, squashed to r x r
    record_ids: tuple[str, ...]  # per row; "" for a row of weight zero
    questions: int  # questions with at least one supervised token
    skipped: tuple[tuple[str, str], ...] = ()  # (record id, reason) of what could not be used

    @property
    def tokens(self) -> float:
        """Supervised tokens."""
        return float(self.answer_weights_BA.sum())

    @property
    def boxes(self) -> float:
        """Valid boxes."""
        return float(self.box_weights_BK.sum())


@dataclass(frozen=True)
class PromptBatch:
    """One open question per row, right-padded, for generation."""

    pixels_B3RR: np.ndarray  # uint8
    token_ids_BS: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, tokens of the prompt
    image_positions_BN: np.ndarray  # int32
