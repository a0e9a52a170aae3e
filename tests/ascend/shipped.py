"""The calls of attention that the shipped configurations make, as shapes."""
import functools
from collections.abc import Iterator
from typing import NamedTuple

from granvit.ablation.grid import read_grid
from granvit.config import CONFIGS, RunConfig, language_config, load_config, resolve_models, vision_config
from granvit.models import LanguageConfig, VisionConfig


class Shapes(NamedTuple):
    """B rows, H query heads, G key heads, S queries, L keys, D head width."""

    B: int
    H: int
    G: int
    S: int
    L: int
    D: int
    masked: bool
    cached: bool = False  # the mask is given, not made of segments (generation)


RECIPES = ("gran29m.yaml", "gran_example.yaml")  # of data stores


def runs() -> Iterator[tuple[str, RunConfig]]:
    """Every run that a file of configs/ describes, with the file's name: runs, and the runs of every setting of an ablation."""
    for path in sorted((*CONFIGS.glob("*.yaml"), *CONFIGS.glob("demo/*.yaml"))):
        if path.name not in RECIPES:
            yield path.name, load_config(path)
    seen = set()
    for path in sorted(CONFIGS.glob("ablations/*.yaml")):
        grid = read_grid(path)
        for setting in grid.settings.values():
            for stage, overrides in setting.items():
                entry = grid.stages[stage]
                run = entry.config, (*entry.overrides, *overrides)
                if run not in seen:
                    seen.add(run)
                    yield path.name, load_config(*run)


def of_encoder(c: VisionConfig, images: int, side: int | None = None) -> Shapes:
    """The call of one block for `images` images of `side` pixels (default: the encoder's own)."""
    tokens = (c.side(side) // c.patch_size) ** 2 + c.class_token
    return Shapes(images, c.heads, c.heads, tokens, tokens, c.head_dim, False)


def of_decoder(c: LanguageConfig, rows: int, S: int, L: int, cached: bool) -> Shapes:
    return Shapes(rows, c.heads, c.kv_heads, S, L, c.head_dim, True, cached)


@functools.cache
def attention_calls() -> dict[Shapes, str]:
    """Every call, with a name of one that makes it: encoders, teachers on crops, decoders on all buckets and in generation, as
    the runs combine them; and every encoder and decoder of configs/models, the decoders on the shortest and longest bucket."""
    calls: dict[Shapes, str] = {}
    lengths = set()
    for name, config in runs():
        vision, language = resolve_models(config)
        rows, K = config.train.micro_batch, config.data.regions_per_row
        calls.setdefault(of_encoder(vision, rows * vision.views), f"{name}: encoder")
        calls.setdefault(of_encoder(vision, config.eval.batch * vision.views), f"{name}: encoder of questions")
        if config.stage_spec.distill and config.distill.weight:
            calls.setdefault(of_encoder(vision, rows * K, config.crop_size(vision)), f"{name}: teacher")
        for bucket in config.data.buckets:
            S, new = bucket.length, config.eval.max_new_tokens
            calls.setdefault(of_decoder(language, rows, S, S, False), f"{name}: decoder, {S} tokens")
            for queries in (S, 1):
                call = of_decoder(language, config.eval.batch, queries, S + new, True)
                calls.setdefault(call, f"{name}: generation, {queries} of {S + new}")
            lengths.add(S)
    for path in sorted(CONFIGS.glob("models/*.yaml")):
        try:
            calls.setdefault(of_encoder(vision_config(path.stem), 1), path.name)
        except ValueError:
            language = language_config(path.stem)
            for S in (min(lengths), max(lengths)):
                calls.setdefault(of_decoder(language, 1, S, S, False), f"{path.name}: {S} tokens")
    return calls
