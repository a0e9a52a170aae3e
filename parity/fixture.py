"""The models and inputs that both frameworks compute with: tiny models, weights and batches, all generated from a seed.

They are chosen so that faults become visible: norm weights are not 1 and biases are not 0, branch outputs match the residual
stream in scale, questions have different lengths, boxes lie anywhere, weight decay and clipping are on, a step accumulates two
micro-batches.
"""
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from granvit.config import DistillSection, RunConfig, parse_config, resolve_models
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import StepInputs
from granvit.init import initial_values
from granvit.introspection import INPUTS, Feed, activation_shapes
from granvit.models import LanguageConfig, Shapes, VisionConfig, parameter_shapes, part_of
from granvit.schedule import alphas

ROWS, REGIONS = 2, 3  # of a micro-batch
QUESTION, ANSWER = (2, 5), (1, 4)  # lengths in tokens are drawn from [low, high)
PREFIX_BEFORE, PREFIX_AFTER = 5, 2  # text tokens of the prefix around the image tokens
MICRO_BATCHES = 2  # of a step, over all ranks
TILED = ((1, 3), (2, 2))  # rows and columns of tiles, in turn for the rows of a batch; 1 x 3 leaves a tile absent
NEW_TOKENS = 6
STOP = 1  # a token that the generation suite is unlikely to choose
EMBEDDING_STD = 0.3  # std of the first blocks' inputs: small, so that the epsilon of a norm matters


@dataclass(frozen=True)
class Fixture:
    """The models and data of one seed. `sections` are merged over the configuration of a run, which `config` returns."""

    seed: int
    vision_name: str
    language_name: str
    vision: VisionConfig
    language: LanguageConfig
    weights: dict[str, np.ndarray]
    batches: tuple[Batch, ...]  # the steps use them in turn
    sections: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = MICRO_BATCHES  # of a step
    share: float = 1.0  # of the global batch: these micro-batches

    def config(self, stage: str, compute: str = "float32", device: str = "cpu") -> RunConfig:
        """The configuration of a run of `stage`; no hyperparameter has a value that would hide its effect."""
        return run_config(stage, self.vision_name, self.language_name, self.seed, compute, device, self.sections)

    def shapes(self, config: RunConfig) -> Shapes:
        """The named activations of one of the fixture's micro-batches."""
        rows, length = self.batches[0].token_ids_BS.shape
        answers = self.batches[0].answer_targets_BA.shape[1]
        boxes = config.boxes_per_row
        found = activation_shapes(self.vision, self.language, rows, length, answers, boxes, config.crop_size(self.vision))
        unused = ("vision", "projector") if config.stage_spec.zero_image_tokens else ()
        return {name: shape for name, shape in found.items() if part_of(name) not in unused}

    def step_inputs(self, step: int, batches: list[Batch]) -> StepInputs:
        """The inputs of step `step` (counted from 1) besides its batches. The learning rate is different in every step."""
        rate, alpha = 1e-2 / (1 + 0.1 * step), float(alphas(DistillSection(**self.sections.get("distill", {})), step)[-1])
        tokens, boxes = (sum(counts) / self.share for counts in zip(*((b.tokens, b.boxes) for b in batches), strict=True))
        averaged = len(batches) if self.sections.get("train", {}).get("loss_reduction") == "per_device" else 0
        return StepInputs(step, rate, alpha, tokens, boxes, averaged)

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step`, counted from 1, over all ranks."""
        first = (step - 1) * self.micro_batches
        return [self.batches[(first + i) % len(self.batches)] for i in range(self.micro_batches)]

    def prompts(self) -> PromptBatch:
        """Two prompts of different lengths."""
        batch, rng = self.batches[0], np.random.default_rng((self.seed, 11))
        prefix = PREFIX_BEFORE + self.vision.image_tokens + PREFIX_AFTER
        lengths = np.array([prefix + 3, prefix + 6], np.int32)
        ids = rng.integers(2, self.language.vocab, (2, int(lengths.max()))).astype(np.int32)
        return PromptBatch(batch.pixels_B3RR[:2], ids, lengths, batch.image_positions_BN[:2])

    def boundary(self, name: str, shape: tuple[int, ...]) -> Feed:
        """A seeded value and gradient that replace one activation, so that the part on one side of it is judged alone."""
        rng = np.random.default_rng((self.seed, 12, *name.encode()))
        scale = EMBEDDING_STD if name == INPUTS else 1.0
        return {name: (scale * rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32) / shape[0])}

    @property
    def is_siglip(self) -> bool:
        """Whether transformers' SigLIP has this encoder's structure."""
        c = self.vision
        sizes = ("name", "image_size", "patch_size", "width", "layers", "heads", "mlp")
        free = ("norm_eps", "level", "built_level", "mean", "std", "resize")
        return c == VisionConfig(**{field: getattr(c, field) for field in (*sizes, *free)})

    @property
    def is_qwen2(self) -> bool:
        """Whether the decoder has Qwen2's biases; without them it is a Llama."""
        return self.language.qkv_bias

    @property
    def weights_hash(self) -> str:
        return digest(self.weights.items())

    @property
    def batches_hash(self) -> str:
        arrays = ((f"{i}.{k}", v) for i, b in enumerate(self.batches) for k, v in vars(b).items() if isinstance(v, np.ndarray))
        return digest(arrays)


def digest(named: Iterator[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes, in the order given."""
    found = hashlib.sha256()
    for name, array in named:
        found.update(f"{name} {array.dtype} {array.shape}\0".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def run_config(stage: str, vision: str, language: str, seed: int, compute: str, device: str,
               sections: Mapping[str, Any] = MappingProxyType({})) -> RunConfig:  # fmt: skip
    """See `Fixture.config`."""
    tree: dict[str, Any] = {
        "stage": stage,
        "output": "unused",
        "seed": seed,
        "model": {"vision": vision, "language": language, "init": "random"},
        "data": {"sources": [{"path": "unused"}], "regions_per_row": REGIONS, "buckets": [{"length": 64, "answers": 16}]},
        "train": {"global_batch": MICRO_BATCHES * ROWS, "micro_batch": ROWS},
        "optimizer": {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        "distill": {"weight": 0.7},
        "runtime": {"compute": compute, "device": device},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree, "parity's fixture")


def make_fixture(seed: int, vision_name: str = "tiny-vision", language_name: str = "tiny-language", batches: int = 4) -> Fixture:
    """A fixture; `ValueError` if there is no model of that name."""
    config = run_config("stage1", vision_name, language_name, seed, "float32", "cpu")
    vision, language = resolve_models(config)
    sizes = batch_sizes(vision)
    made = tuple(random_batch(vision, language, *sizes, seed=(seed, 1, i)) for i in range(batches))
    return Fixture(seed, vision_name, language_name, vision, language, start_values(vision, language, seed), made)


def batch_sizes(vision: VisionConfig) -> tuple[int, int, int, int]:
    """Rows, regions, length and answers of a micro-batch; every row has some padding."""
    longest = PREFIX_BEFORE + vision.image_tokens + PREFIX_AFTER + REGIONS * (QUESTION[1] + ANSWER[1] - 2)
    return ROWS, REGIONS, longest + 1, REGIONS * (ANSWER[1] - 1) + 1


def start_values(vision: VisionConfig, language: LanguageConfig, seed: int) -> dict[str, np.ndarray]:
    """Random weights that make faults visible, float32."""
    rng = np.random.default_rng((seed, 2))
    values = {}
    for name, value in initial_values(parameter_shapes(vision, language), seed).items():
        if value.ndim == 1:
            value = value + 0.2 * rng.standard_normal(value.shape)
        else:
            fan_in = 1 if name.endswith(("embed_tokens.weight", "position_embedding.weight")) else np.prod(value.shape[1:])
            value = value / value.std() * fan_in**-0.5 * (EMBEDDING_STD if "embed" in name else 1)
        values[name] = value.astype(np.float32)
    return values


def random_batch(vision: VisionConfig, language: LanguageConfig, rows: int, regions: int, length: int, answers: int,
                 seed: int | tuple[int, ...], crop: int | None = None) -> Batch:  # fmt: skip
    """Rows of one image and `regions` questions of different lengths, each with a box; padded to `length` and `answers`. Crops
    have `crop` pixels a side (default: the image's). With tiling, rows have `TILED` tiles in turn; absent tiles have random
    pixels too. The packer (`granvit.data.batch`) is not used."""
    rng = np.random.default_rng(seed)
    N, crop = vision.image_tokens, crop or vision.image_size
    prefix = PREFIX_BEFORE + N + PREFIX_AFTER
    tokens = rng.integers(1, language.vocab, (rows, length)).astype(np.int32)
    positions = np.zeros((rows, length), np.int32)
    segments = np.full((rows, length), -1, np.int32)
    answer_positions, targets = np.zeros((rows, answers), np.int32), np.zeros((rows, answers), np.int32)
    weights = np.zeros((rows, answers), np.float32)
    for row in range(rows):
        positions[row, :prefix], segments[row, :prefix] = np.arange(prefix), 0
        start, used = prefix, 0
        for region in range(regions):
            question, answer = int(rng.integers(*QUESTION)), int(rng.integers(*ANSWER))
            size = question + answer
            assert start + size <= length and used + answer <= answers, "length or answers too small for the rows"
            positions[row, start : start + size] = prefix + np.arange(size)
            segments[row, start : start + size] = region + 1
            answer_positions[row, used : used + answer] = start + question - 1 + np.arange(answer)
            targets[row, used : used + answer] = tokens[row, start + question : start + size]
            weights[row, used : used + answer] = 1
            start, used = start + size, used + answer
    places, grids, view = np.tile(np.arange(PREFIX_BEFORE, PREFIX_BEFORE + N, dtype=np.int32), (rows, 1)), None, ()
    if vision.tiles:
        view, grids = (vision.views,), np.array([TILED[row % len(TILED)] for row in range(rows)], np.int32)
        present = (1 + grids.prod(1)) * vision.view_tokens
        places[np.arange(N) >= present[:, None]] = -1
    corners = np.sort(rng.uniform(0, 1, (rows, regions, 2, 2)), axis=2)
    return Batch(
        pixels_B3RR=rng.integers(0, 256, (rows, *view, 3, vision.image_size, vision.image_size)).astype(np.uint8),
        image_weights_B=np.ones(rows, np.float32),
        token_ids_BS=tokens,
        positions_BS=positions,
        segments_BS=segments,
        image_positions_BN=places,
        answer_positions_BA=answer_positions,
        answer_targets_BA=targets,
        answer_weights_BA=weights,
        boxes_BK4=corners.reshape(rows, regions, 4).astype(np.float32),
        box_weights_BK=np.ones((rows, regions), np.float32),
        crops_BK3rr=rng.integers(0, 256, (rows, regions, 3, crop, crop)).astype(np.uint8),
        record_ids=tuple(f"row-{row}" for row in range(rows)),
        questions=rows * regions,
        grids_B2=grids,
    )
