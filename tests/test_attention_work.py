"""Counts of attention's pairs against a loop over all pairs, and against counts by hand."""
import numpy as np
import pytest

from granvit.attention_work import causal_share, computed_share, main, masked_share, needed_pairs, row_segments, split_share
from granvit.config import CONFIGS, load_config

ROWS = np.array([[0] * 5 + [1] * 3 + [2] * 4 + [-1] * 4, [0] * 7 + [1] * 9])


def counted(segments):
    """Shares by the reason, pair by pair."""
    found = dict.fromkeys(("causal", "padding", "segments", "needed"), 0)
    for row in segments:
        for i, j in np.ndindex(len(row), len(row)):
            if j > i:
                found["causal"] += 1
            elif row[i] < 0 or row[j] < 0:
                found["padding"] += 1
            else:
                found["needed" if row[j] in (0, row[i]) else "segments"] += 1
    return {reason: count / segments.size / segments.shape[1] for reason, count in found.items()}


def test_masked_shares_are_those_of_a_loop_over_all_pairs():
    masked, expected = masked_share(ROWS), counted(ROWS)
    for reason in ("causal", "padding", "segments"):
        assert getattr(masked, reason) == pytest.approx(expected[reason])
    assert masked.total == pytest.approx(1 - expected["needed"]) == pytest.approx(1 - needed_pairs(ROWS).mean())
    assert masked_share(ROWS[1:]).total == pytest.approx(120 / 256)  # a causal row: 16 x 15 / 2 pairs are later


def test_computed_shares_of_blocks():
    pairs = np.zeros((1, 10, 10), bool)
    pairs[0, 0, 9] = True
    assert computed_share(pairs, 4) == 4 * 2 / 100  # the last block is narrower
    assert causal_share(8, 4) == 3 / 4 and causal_share(8, 1) == 36 / 64 and causal_share(8, 8) == 1
    assert computed_share(needed_pairs(ROWS), 1) == pytest.approx(needed_pairs(ROWS).mean())


def test_a_split_by_segments():
    # prefix of 5: 15 pairs; 7 question tokens over 5; own triangles of 3 and 4: 6 and 10
    assert split_share(ROWS[0], 1) == (15 + 35 + 6 + 10) / 256 == pytest.approx(needed_pairs(ROWS[:1]).mean())
    # blocks of 4: the prefix 16 + 4 + 1, 8 rows over 5, 3 x 3 and 4 x 4
    assert split_share(ROWS[0], 4) == (16 + 4 + 1 + 40 + 9 + 16) / 256


def test_rows_of_a_configuration():
    kinds = list(row_segments(load_config(CONFIGS / "stage1_packed.yaml")))
    assert sum(share for _, share, _ in kinds) == pytest.approx(1)
    (segments,) = [segments for label, _, segments in kinds if label == "4 region(s), 1 caption(s)"]
    assert len(segments) == 1536 and (segments == 0).sum() == 1024 + 20 and segments.max() == 5
    assert [int((segments == s).sum()) for s in range(1, 6)] == [70, 70, 70, 70, 180]


def test_the_command(capsys):
    main(["configs/stage1_packed.yaml", "configs/sft.yaml"])
    assert "stage1_packed.yaml" in (out := capsys.readouterr().out) and "3072" in out
