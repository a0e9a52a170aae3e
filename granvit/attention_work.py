"""How much of the S x S pairs of query and key a decoder's attention needs, and how many a kernel computes.

    python -m granvit.attention_work configs/stage1_packed.yaml

prints both for the rows of a configuration: how many questions share a row as `granvit.plan` counts them, their lengths as it
assumes them. Conversations (sft) and captions (projector) have no lengths there: a row that fills the bucket stands for them.
Shares are of the pairs of the bucket, S^2, and hold for every head and layer, forward and backward.
"""
import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from granvit.config import RunConfig, find_config, load_config, resolve_models
from granvit.plan import PLANNED, TEMPLATE, TEXT, Plan, paper_images

BLOCK = 128  # rows and columns of the smallest product of a fused kernel (FlashAttention-2; CANN's cube: 128 x 128)


class Masked(NamedTuple):
    """Shares of the pairs that are not needed, by the first reason that holds; together at most 1."""

    causal: float  # the key is later than the query
    padding: float  # query or key is padding
    segments: float  # the key belongs to another question

    @property
    def total(self) -> float:
        return sum(self)


def needed_pairs(segments_BS: np.ndarray) -> np.ndarray:
    """Boolean `[B, S, S]`, true where query i needs key j: the shared-prefix rule (`granvit.data.batch.Batch`), without queries
    that are padding."""
    keys, queries = segments_BS[:, None, :], segments_BS[:, :, None]
    return np.tri(segments_BS.shape[1], dtype=bool) & (queries >= 0) & ((keys == 0) | (keys == queries))


def masked_share(segments_BS: np.ndarray) -> Masked:
    """Shares of the pairs of rows with these segments (0 prefix, 1.. questions, -1 padding) that attention does not need."""
    S = segments_BS.shape[1]
    needed, earlier = needed_pairs(segments_BS), np.tri(S, dtype=bool)
    real = segments_BS >= 0
    padded = earlier & ~(real[:, :, None] & real[:, None, :])
    return Masked(1 - float(earlier.mean()), float(padded.mean()), float((earlier & ~padded & ~needed).mean()))


def computed_share(pairs_BSS: np.ndarray, block: int = BLOCK) -> float:
    """The share of pairs in those blocks of `block` x `block` that hold a true pair: what a kernel computes that skips others."""
    S = pairs_BSS.shape[-1]
    starts = np.arange(0, S, block)
    touched = np.logical_or.reduceat(np.logical_or.reduceat(pairs_BSS, starts, 1), starts, 2)
    sizes = np.diff(starts, append=S)
    return float((touched * np.outer(sizes, sizes)).sum() / pairs_BSS.size)


def causal_share(S: int, block: int = BLOCK) -> float:
    """`computed_share` of a kernel that knows only that keys are not later than queries."""
    return computed_share(np.tri(S, dtype=bool)[None], block)


def split_share(segments_S: np.ndarray, block: int = BLOCK) -> float:
    """The share for one row of three calls whose softmax is merged: the prefix over itself, the questions over the prefix, each
    question over itself. Every call skips blocks above its diagonal; the rows of a call are filled up to whole blocks."""
    S = len(segments_S)
    prefix, *questions = (int((segments_S == s).sum()) for s in range(segments_S.max() + 1))
    rows = -(-sum(questions) // block) * block
    own = sum(causal_share(n, block) * n * n for n in (prefix, *questions) if n)
    return (own + rows * prefix) / S**2


def row_segments(config: RunConfig) -> Iterator[tuple[str, float, np.ndarray]]:
    """The kinds of row of a configuration: what is in it, its share of the rows, its segments `[S]`."""
    vision, language = resolve_models(config)
    if config.stage not in PLANNED:
        for bucket in config.data.buckets:
            prefix = min(vision.image_tokens + TEMPLATE, bucket.length - 1)
            yield "one conversation", 1 / len(config.data.buckets), np.repeat((0, 1), (prefix, bucket.length - prefix))
        return
    plan = Plan(config, vision, language, paper_images(config.stage_spec.mix))
    total = sum(plan.rows.values())
    asked = {task: count for task, count in plan.questions.items() if task != "global"}
    region = round(sum(count * TEXT[task] for task, count in asked.items()) / max(sum(asked.values()), 1)) - TEMPLATE
    for (regions, captions), count in plan.rows.items():
        lengths = [vision.image_tokens + TEMPLATE, *[region] * regions, *[TEXT["global"] - TEMPLATE] * captions]
        S = plan.bucket((regions, captions)).length
        used = np.minimum(np.cumsum(lengths), S)
        segments = np.full(S, -1)
        for number, (start, end) in enumerate(zip((0, *used[:-1]), used, strict=True)):
            segments[start:end] = number
        yield f"{regions} region(s), {captions} caption(s)", count / total, segments


def table(config: RunConfig, name: str) -> Table:
    """The shares of every kind of row of a configuration and their mean, weighted with S^2."""
    made = Table(title=f"{name}: shares of S x S, blocks of {BLOCK}")
    columns = ("rows", "S", "of rows", "causal", "padding", "segments", "masked", "next_tokens=0", "blocks", "split")
    for column in columns:
        made.add_column(column, justify="left" if column == "rows" else "right")
    sums, weights = np.zeros(len(columns) - 3), 0.0
    for label, share, segments_S in row_segments(config):
        S, masked = len(segments_S), masked_share(segments_S[None])
        skipped = computed_share(needed_pairs(segments_S[None]))
        shares = [*masked, masked.total, causal_share(S), skipped, split_share(segments_S)]
        made.add_row(label, str(S), f"{share:.1%}", *(f"{x:.1%}" for x in shares))
        sums += share * S**2 * np.array(shares)
        weights += share * S**2
    made.add_section()
    made.add_row("mean", "", "", *(f"{x:.1%}" for x in sums / weights))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="YAML files of runs, as for scripts/stage1.py")
    console = Console(width=130)
    for path in parser.parse_args(arguments).configs:
        console.print(table(load_config(find_config(path)), path))


if __name__ == "__main__":
    main()
