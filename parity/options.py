"""Further fixtures: six configurations in which every option that affects a graph has every value at least once.

The default fixture is one encoder, one decoder, stage 1 and stage 2. The configurations here run the code that only other options
reach. Each is a tiny pair of models, run forward and trained for one step. `domain` lists all options ("factors") with their
values, `factors` gives the values of one configuration, and tests/parity/test_options.py fails for a value that no configuration
has. Fields of `granvit.models` and `granvit.config` that are `Literal` or `bool` are found automatically.
"""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, get_args, get_origin

import numpy as np
from pydantic import BaseModel

from granvit.config import PartsSection, RunConfig
from granvit.models import PARTS, LanguageConfig, VisionConfig
from parity.fixture import MICRO_BATCHES, Fixture, batch_sizes, make_fixture, random_batch, run_config, start_values

Values = dict[str, str]  # factor -> the value that a configuration has
VISION = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp": 32}
LANGUAGE = {"vocab": 96, "width": 16, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 32, "rope_theta": 1e4,
            "norm_eps": 1e-6, "tied_head": True, "qkv_bias": True}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """The differences from the default fixture. `text_rows` is the number of rows in a micro-batch without image and boxes.
    `share` is the share of the global batch that the micro-batches are; a small one makes gradients as small as the epsilon of
    clipping."""

    stage: str
    vision: Mapping[str, Any] = field(default_factory=dict)
    language: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = MICRO_BATCHES
    share: float = 1.0
    text_rows: int = 0


OPTIONS: dict[str, Option] = {
    # The modules of CLIP's encoder; distillation on features after the closing norm, pooled to a smaller grid, with cosine loss.
    "pooled": Option(
        "stage1",
        {"activation": "quick_gelu", "class_token": True, "pre_norm": True, "patch_bias": False, "level": "last",
         "built_level": "final", "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "norm_eps": 1e-5},
        {"tied_head": False, "qkv_bias": False, "kv_heads": 4},
        {"distill": {"weight": 0.7, "loss": "cosine", "grid": 2, "features": "final", "alpha_warmup": 4},
         "runtime": {"recompute": True}},
        micro_batches=1,
    ),
    # The modules of AIMv2's encoder; crops smaller than the image, so that the teacher's positions are resampled; a row of text.
    "resampled": Option(
        "stage1",
        {"norm": "rms", "activation": "silu", "gated_mlp": True, "bias": False, "patch_norm": True, "image_size": 35,
         "class_token": True, "layers": 3},
        {"tied_head": True, "qkv_bias": False},
        {"distill": {"weight": 0.7, "crop_size": 24, "alpha": 0.8}, "optimizer": {"weight_decay": 0.0, "clip_norm": 1e9}},
        text_rows=1,
    ),
    # The paper's high resolution, with the modules of InternViT's encoder.
    "tiled": Option(
        "stage1",
        {"activation": "gelu", "layer_scale": True, "closing_norm": False, "level": "penultimate", "built_level": "last"},
        {"tied_head": False, "qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-5},
        {"distill": {"weight": 0.7, "crop_size": 16, "loss": "cosine"}, "vision": {"tiling": 4}},
    ),
    # The projector gets the features after the encoder's closing norm. Encoder and decoder train, with learning rates of their
    # own; losses are averaged per micro-batch.
    "tuned": Option(
        "sft",
        {"norm": "rms", "activation": "gelu", "layer_scale": True, "bias": True, "gated_mlp": True, "pre_norm": True,
         "level": "final", "patch_norm": True},
        {"kv_heads": 4, "tied_head": True},
        {"train": {"freeze": ["projector"], "loss_reduction": "per_device"}, "runtime": {"recompute": True},
         "optimizer": {"parts": {"vision": {"lr": 0.03, "weight_decay": 0.0}, "language": {"weight_decay": 0.3}}}},
        text_rows=1,
    ),
    # Only the projector trains, with tiling.
    "projector": Option(
        "sft",
        {"class_token": True, "level": "last", "bias": False, "patch_bias": False},
        {"tied_head": False, "kv_heads": 4},
        {"train": {"freeze": ["vision", "language"]}, "vision": {"tiling": 4},
         "optimizer": {"weight_decay": 0.0, "clip_norm": 1e-5}},
        micro_batches=1, share=1e-5,
    ),
    # The image tokens are zeros.
    "guesser": Option("guesser", {"activation": "silu"}, {"qkv_bias": False}, {"optimizer": {"clip_norm": 1e9}}),
}  # fmt: skip


def option_suite(name: str) -> str:
    """The name of a configuration's suite."""
    return f"option {name}"


def option_fixture(seed: int, name: str) -> Fixture:
    """The models and data of one configuration; its run is `fixture.config(OPTIONS[name].stage)`."""
    option = OPTIONS[name]
    config = run_config(option.stage, name, name, seed, "float32", "cpu", option.sections)
    vision = VisionConfig(**{"name": name, **VISION, **option.vision, "tiles": config.vision.tiling})
    language = LanguageConfig(**{"name": name, **LANGUAGE, **option.language})
    crop = config.crop_size(vision)
    made = [random_batch(vision, language, *batch_sizes(vision), (seed, 3, i), crop) for i in range(option.micro_batches)]
    made = [replace(batch, image_weights_B=_shown(batch.image_weights_B, option),
                    box_weights_BK=_shown(batch.box_weights_BK, option)) for batch in made]  # fmt: skip
    return Fixture(seed, name, name, vision, language, start_values(vision, language, seed), tuple(made), option.sections,
                   option.micro_batches, option.share)  # fmt: skip


def _shown(weights: np.ndarray, option: Option) -> np.ndarray:
    """Weights by row, 0 in the last `text_rows`."""
    shown_weights = weights.copy()
    shown_weights[len(shown_weights) - option.text_rows :] = 0
    return shown_weights


# --- all options and their values, and those of a configuration -------------------------------------------------------
# Fields with fixed values that do not affect a graph, and why.
NOT_IN_THE_GRAPH = {
    "vision.built_level": "covered by the factor `built level`",
    "vision.resize": "images are resized on the host (tests/data/test_images.py)",
    "vision.closing_norm": "decides which levels exist; `level` and `built level` are factors",
    "language.chat": "a chat template is text (tests/data/test_chat.py)",
    "run.stage": "covered by the factors for trained parts, distillation and zero image tokens",
    "run.model.init": "where start weights come from (tests/test_stages.py)",
    "run.data.mix": "selects questions (tests/data/test_sampler.py)",
    "run.eval.tasks": "selects the questions of an evaluation (tests/test_metrics.py)",
    "run.eval.start": "whether an evaluation precedes the first step (tests/test_metrics.py)",
    "run.train.freeze": "covered by the factors `vision`, `projector`, `language`",
    "run.optimizer.schedule": "the learning rate is an input of the graph (tests/test_core.py)",
    "run.runtime.compute": "chosen by --precision; on CPU MindSpore computes only in float32",
    "run.runtime.compile": "PyTorch's (tests/pt/test_compile.py)",
    "run.runtime.jit_level": "has an effect only on Ascend",
    "run.runtime.device": "chosen by --device",
    "run.runtime.kernels": "each implementation is compared by the suite `kernels`; chosen by --kernels",
}


def words() -> dict[str, tuple[str, ...]]:
    """The fields of `VisionConfig`, `LanguageConfig` and `RunConfig` that are `Literal` or `bool`, and their values."""
    roots = (("vision", VisionConfig), ("language", LanguageConfig), ("run", RunConfig))
    return {path: values for root, model in roots for path, values in _words(model, root)}


def _words(model: type[BaseModel], path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _words(kind, f"{path}.{name}")
        elif values := tuple(dict.fromkeys(_literals(kind))):
            yield f"{path}.{name}", values


def _literals(kind: Any) -> Iterator[str]:
    if kind is bool:
        yield from ("False", "True")
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for inner in get_args(kind):
            yield from _literals(inner)


# Factors that are not one field with fixed values: numbers with several regimes, and combinations of fields.
Read = Callable[[RunConfig, VisionConfig, LanguageConfig, Option], str]
NUMBERS: dict[str, tuple[tuple[str, ...], Read]] = {
    "ROI grid": (("none", "the teacher's", "below"), lambda r, v, c, o: _grid(r, v)),
    "crops": (("none", "the image's size", "below"), lambda r, v, c, o: _crops(r, v)),
    "tiles": (("none", "some"), lambda r, v, c, o: "some" if v.tiles else "none"),
    "built level": (("penultimate", "last", "final"), lambda r, v, c, o: v.built_level),
    "distillation": (("False", "True"), lambda r, v, c, o: str(r.stage_spec.distill)),
    "zero image tokens": (("False", "True"), lambda r, v, c, o: str(r.stage_spec.zero_image_tokens)),
    **{part: (("frozen", "trained"), lambda r, v, c, o, part=part: "trained" if part in r.stage_spec.trains else "frozen")
       for part in PARTS},
    "key heads": (("as many as query heads", "fewer"),
                  lambda r, v, c, o: "fewer" if c.kv_heads < c.heads else "as many as query heads"),
    "pixels beyond the patches": (("none", "some"), lambda r, v, c, o: "some" if v.covered_pixels < v.image_size else "none"),
    "weight decay": (("none", "some"), lambda r, v, c, o: "some" if r.optimizer.weight_decay else "none"),
    "clipping": (("never", "at work"), lambda r, v, c, o: "never" if r.optimizer.clip_norm > 1e6 else "at work"),
    "alpha": (("at once", "warm-up"), lambda r, v, c, o: "warm-up" if r.distill.alpha_warmup else "at once"),
    "micro-batches": (("one", "several"), lambda r, v, c, o: "one" if o.micro_batches == 1 else "several"),
    "rates": (("of all parts", "of each part"),
              lambda r, v, c, o: "of all parts" if r.optimizer.parts == PartsSection() else "of each part"),
    "text rows": (("none", "some"), lambda r, v, c, o: "some" if o.text_rows else "none"),
}  # fmt: skip


def _grid(run: RunConfig, vision: VisionConfig) -> str:
    if not run.stage_spec.distill:
        return "none"
    teacher_grid = run.crop_size(vision) // vision.patch_size
    return "below" if (run.distill.grid or teacher_grid) < teacher_grid else "the teacher's"


def _crops(run: RunConfig, vision: VisionConfig) -> str:
    if not run.stage_spec.distill:
        return "none"
    return "below" if run.crop_size(vision) < vision.covered_pixels else "the image's size"


def domain() -> dict[str, tuple[str, ...]]:
    """Every factor and the values that must be covered."""
    in_graph = {path: values for path, values in words().items() if path not in NOT_IN_THE_GRAPH}
    return in_graph | {name: values for name, (values, _) in NUMBERS.items()}


def factors(option: Option, run: RunConfig, vision: VisionConfig, language: LanguageConfig) -> Values:
    """The value of every factor that affects the graphs of one configuration. Without distillation its fields are left out, and
    with zero image tokens those of the encoder."""
    found = {}
    for path in domain():
        if path in NUMBERS:
            found[path] = NUMBERS[path][1](run, vision, language, option)
            continue
        root, *fields = path.split(".")
        value: Any = {"vision": vision, "language": language, "run": run}[root]
        for name in fields:
            value = getattr(value, name)
        spec = run.stage_spec
        unused = (root == "vision" and spec.zero_image_tokens) or (fields[0] == "distill" and not spec.distill)
        if value is not None and not unused:
            found[path] = str(value)
    return found


def configurations(seed: int = 0) -> dict[str, Values]:
    """The factors of the default fixture's two stages and of every option."""
    found, default = {}, make_fixture(seed)
    for stage in ("stage1", "stage2"):
        found[stage] = factors(Option(stage), default.config(stage), default.vision, default.language)
    for name, option in OPTIONS.items():
        fixture = option_fixture(seed, name)
        found[name] = factors(option, fixture.config(option.stage), fixture.vision, fixture.language)
    return found


def pairs(values: Values) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of values of two different factors."""
    return set(combinations(sorted(values.items()), 2))


def coverage() -> tuple[list[tuple[str, str, str]], int, int]:
    """Rows of (factor, value, configurations that have it), the number of pairs of values that are covered, and of all pairs."""
    found = configurations()
    rows = [(factor, value, ", ".join(name for name, own in found.items() if own.get(factor) == value))
            for factor, values in domain().items() for value in values]  # fmt: skip
    all_pairs = sum(len(a) * len(b) for a, b in combinations(domain().values(), 2))
    return rows, len(set().union(*map(pairs, found.values()))), all_pairs
