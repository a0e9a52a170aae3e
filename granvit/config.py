"""A run's configuration: one YAML file plus `key=value` overrides. Unknown keys are errors.

`load_config("configs/stage1.yaml", ["train.steps=50"])`. A file may name another file as `base:` (relative to itself) and hold
only the keys that differ from it. The resolved configuration is written to the run's directory; loading that file gives an equal
configuration.
"""
import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, field_validator, model_validator

from granvit.kernels import Operator, check_names
from granvit.models import PARTS, LanguageConfig, Strict, VisionConfig
from granvit.stages import STAGES, RegionTask, Stage, StageName, Task

Valid = TypeVar("Valid", bound=BaseModel)
_HERE = Path(__file__).resolve().parent
# In an installed wheel the configurations are inside the package, in a checkout beside it.
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


class Bucket(Strict):
    """A row shape, for which one graph is compiled: `length` tokens, at most `answers` of them supervised."""

    length: int = Field(gt=0)
    answers: int = Field(gt=0)


class Source(Strict):
    """One store of regions (`granvit.data.store`) or of conversations (`granvit.data.conversations`).

    `rate` is the share of its region questions or conversations that one epoch uses, drawn anew for every epoch. `count` states
    instead, for each task, how many of its questions an epoch uses (none of a task that it does not name). They are the same in
    every epoch and for every seed of the run; `draw` is the seed that chooses them (granvit/data/draw.py)."""

    path: str
    rate: float = Field(1.0, ge=0, le=1)
    count: dict[Task, NonNegativeInt] | None = None
    draw: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_of_both(self) -> "Source":
        if self.count is not None and self.rate != 1:
            raise ValueError("rate and count both choose questions; leave one of them out")
        return self


class ModelSection(Strict):
    """`vision` and `language` name files in configs/models. `weights_*` are directories with published weights: config.json,
    *.safetensors and, for the decoder, tokenizer.json. `init_from` is the directory of a run: training starts from its newest
    checkpoint."""

    vision: str = "siglip2-so400m-patch16-512"
    language: str = "qwen2.5-1.5b"
    init: Literal["pretrained", "random"] = "pretrained"
    init_from: str | None = None
    weights_vision: str = "weights/siglip2-so400m-patch16-512"
    weights_language: str = "weights/Qwen2.5-1.5B-Instruct"
    tokenizer: str | None = None  # default: weights_language


class VisionSection(Strict):
    """`tiling` is the largest number of tiles per image, in addition to the global view (paper A.5); 0: no tiling."""

    tiling: int = Field(0, ge=0)


class DataSection(Strict):
    """`sources` is a list of stores, or the path of a mix (OUT/mixes/NAME.yaml of scripts/build_gran.py), which holds such a list
    with paths relative to its own folder. `mix` replaces the stage's shares of the tasks; an override such as
    `data.mix.global=0.5` changes one share and keeps the others. With `regions_per_row` 1 every row has one question (the paper's
    literal reading). Above 1, up to that many region questions about an image and its global question share one row and its
    prefix."""

    sources: tuple[Source, ...]
    mix: dict[Task, float] | None = None
    regions_per_row: int = Field(1, ge=1)
    buckets: tuple[Bucket, ...] = Field(min_length=1)
    workers: int = Field(0, ge=0)  # processes that read and decode images; 0: threads of this process
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    max_pixels: int = Field(89_478_485, gt=0)  # Pillow's default limit

    @field_validator("sources", mode="before")
    @classmethod
    def _of_mix(cls, value: Any) -> Any:
        return read_mix(Path(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _counts_or_shares(self) -> "DataSection":
        counted = {task for source in self.sources for task in source.count or ()}
        for task, share in (self.mix or {}).items():
            if task in counted and 0 < share < 1:
                raise ValueError(f"mix.{task} is {share:g}, but a source states a count for it: set it to 1, or to 0 to ask none")
        return self


class TrainSection(Strict):
    """`global_batch` counts the rows of one step over all ranks, `micro_batch` the rows of one forward pass on one rank. A row
    has up to `data.regions_per_row` region questions; a conversation is one row. `freeze` names parts that the stage trains by
    default and this run keeps frozen (for example the encoder in sft: paper, Table 10).

    `loss_reduction` says how losses are averaged.
    `global`, the default: the sum over all supervised tokens (boxes) of the global batch, divided by their number. Every token
    has the same weight. The result does not depend on the number of devices or on `micro_batch`, so a run can be resumed with
    other values of them.
    `per_device`: the mean over micro-batches of each micro-batch's mean. The LLaVA framework computes this: cross-entropy is
    averaged per device, gradients are averaged by DDP and over accumulation steps. A token in a micro-batch with few supervised
    tokens has a larger weight. Micro-batches here hold rows of similar length (`granvit.data.sampler`), so the means are over
    other rows than with random assignment. The paper trains with the LLaVA framework and does not say how it averages.

    `skip_non_finite`: up to this many consecutive steps with a non-finite loss or gradient are left out; one more stops the run.
    Left-out steps are counted in the checkpoint, so the same command continues after them."""

    global_batch: int = Field(256, gt=0)
    micro_batch: int = Field(2, gt=0)
    epochs: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)  # default: all of the epochs
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(3, gt=0)
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    loss_reduction: Literal["global", "per_device"] = "global"
    skip_non_finite: int = Field(3, ge=0)


class PartSection(Strict):
    """Settings of one part of the model."""

    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class PartsSection(Strict):
    """Learning rate and weight decay by part; the defaults are `optimizer.lr` and `optimizer.weight_decay`."""

    vision: PartSection = PartSection()
    projector: PartSection = PartSection()
    language: PartSection = PartSection()


class OptimizerSection(Strict):
    """AdamW. The paper gives only the learning rate; the other defaults are this project's choice. Weight decay applies to
    matrices, not to biases, norms and layer scales. `parts` overrides the learning rate and decay of single parts; warm-up and
    schedule are common to all."""

    lr: float = Field(1e-5, gt=0)
    warmup: float = Field(0.03, ge=0, le=1)  # share of the steps
    schedule: Literal["cosine", "constant"] = "cosine"
    cooldown: float = Field(0.0, ge=0, le=1)  # share of the steps, at the end, over which `constant` falls linearly to 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    parts: PartsSection = PartsSection()

    def of_part(self, part: str) -> tuple[float, float]:
        """Learning rate (before warm-up and schedule) and weight decay of one part."""
        own: PartSection = getattr(self.parts, part)
        lr = self.lr if own.lr is None else own.lr
        return lr, self.weight_decay if own.weight_decay is None else own.weight_decay

    @model_validator(mode="after")
    def _cools_from_a_constant(self) -> "OptimizerSection":
        if self.cooldown and self.schedule != "constant":
            raise ValueError(f"optimizer.cooldown needs optimizer.schedule=constant, not {self.schedule!r}; leave it out")
        return self


class DistillSection(Strict):
    """Self-distillation (paper section 4.3). `weight` is the paper's lambda, `alpha` the teacher's EMA rate."""

    weight: float = Field(1.0, ge=0)
    alpha: float = Field(0.9, ge=0, le=1)
    alpha_warmup: int = Field(0, ge=0)  # steps over which alpha rises linearly from 0
    loss: Literal["mse", "cosine"] = "mse"
    features: Literal["projector_input", "final"] = "projector_input"
    grid: int | None = Field(None, gt=0)  # ROI output grid; default: the teacher's patch grid
    crop_size: int | None = Field(None, gt=0)  # pixels; default: the side that the encoder's patches cover
    crop_scale: float = Field(1.0, gt=0)  # crops are boxes enlarged by this factor (CLIPSelf: 1.5)
    max_boxes: int | None = Field(None, gt=0)  # default: data.regions_per_row


class EvalSection(Strict):
    """Evaluation on the held-out store `source`, every `every` steps (0: never) and at the end of the run; with `start` also of
    the start weights, as step 0.

    It computes the training loss on about `rows` rows (rounded up to whole global batches; 0: no loss), and generates and scores
    answers to the questions of `tasks` about `images` images (no tasks: no answers). `batch` is the number of questions that one
    rank answers at once. In MindSpore the held-out loss has its own graph, compiled once per bucket at the first evaluation."""

    source: str | None = None
    every: int = Field(0, ge=0)
    start: bool = False
    rows: int = Field(256, ge=0)
    images: int = Field(256, gt=0)
    batch: int = Field(8, gt=0)
    max_new_tokens: int = Field(64, gt=0)
    tasks: tuple[RegionTask, ...] = ("bbox2caption", "caption2bbox")


class RuntimeSection(Strict):
    """`compute` is the dtype of activations and frozen weights. Trained weights (masters), moments, teacher, softmax, norms and
    losses are always float32. float16 and float64 are for parity/ only: float64 is its reference, and training in float16 needs
    loss scaling, which is not implemented."""

    FORMER_KEYS: ClassVar[dict[str, str]] = {"attention": "kernels"}

    compute: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    recompute: bool = False
    jit_level: Literal["O0", "O1"] = "O0"  # MindSpore
    compile_cache: str | None = None  # MindSpore: a directory in which compiled graphs are kept for the next start
    compile: bool = False  # PyTorch: forward and backward pass by torch.compile
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    # Operator -> implementation, or several in order of preference (docs/kernels.md); auto where none is named.
    kernels: dict[Operator, str | list[str]] = Field(default_factory=dict)

    @field_validator("kernels")
    @classmethod
    def _known(cls, kernels: dict[Operator, str | list[str]]) -> dict[Operator, str | list[str]]:
        for operator, name in kernels.items():
            check_names(operator, name)
        return kernels

    @model_validator(mode="before")
    @classmethod
    def _attention_of_earlier_versions(cls, values: Any) -> Any:
        """Runs of earlier versions have a key `attention` in place of `kernels`."""
        if isinstance(values, dict) and "attention" in values:
            values = dict(values)
            name = values.pop("attention")
            values["kernels"] = {**values.get("kernels", {}), **({} if name == "auto" else {"attention": name})}
        return values


class RunConfig(Strict):
    """One run."""

    stage: StageName
    output: str
    seed: int = 0
    model: ModelSection = ModelSection()
    vision: VisionSection = VisionSection()
    data: DataSection
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    distill: DistillSection = DistillSection()
    eval: EvalSection = EvalSection()
    runtime: RuntimeSection = RuntimeSection()

    @property
    def stage_spec(self) -> Stage:
        """The stage as this run trains it: with `data.mix` (where it is set) and without the parts in `train.freeze`. With
        `distill.weight` 0 there is no self-distillation and no teacher is built (the paper's ablation, Table 3)."""
        stage = STAGES[self.stage]
        mix = stage.mix if self.data.mix is None else self.data.mix
        trains = stage.trains.difference(self.train.freeze)
        return replace(stage, trains=trains, mix=mix, distill=stage.distill and self.distill.weight > 0)

    @property
    def boxes_per_row(self) -> int:
        """Largest number of boxes distilled per row; 0 without distillation."""
        if not self.stage_spec.distill:
            return 0
        return min(self.distill.max_boxes or self.data.regions_per_row, self.data.regions_per_row)

    def crop_size(self, vision: VisionConfig) -> int:
        """Side of the teacher's crops in pixels. Default: what its patches cover, so that its grid spans the whole box."""
        return self.distill.crop_size or vision.covered_pixels

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        lengths = [b.length for b in self.data.buckets]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"data.buckets must be in ascending order of length, each length once, not {lengths}")
        return self

    @model_validator(mode="after")
    def _freezes_what_the_stage_trains(self) -> "RunConfig":
        trains = STAGES[self.stage].trains
        foreign = [part for part in self.train.freeze if part not in trains]
        if foreign:
            named = ", ".join(part for part in PARTS if part in trains)
            raise ValueError(f"train.freeze names {', '.join(foreign)}, which {self.stage} does not train; it trains {named}")
        if not self.stage_spec.trains:
            raise ValueError(f"train.freeze leaves {self.stage} nothing to train; name fewer parts")
        if self.stage_spec.distill and "vision" in self.train.freeze:
            raise ValueError("train.freeze names vision, but self-distillation trains the encoder; set distill.weight=0 as well")
        return self

    @model_validator(mode="after")
    def _sets_rates_of_what_trains(self) -> "RunConfig":
        trains = self.stage_spec.trains
        for part in PARTS:
            if getattr(self.optimizer.parts, part) != PartSection() and part not in trains:
                named = ", ".join(part for part in PARTS if part in trains)
                raise ValueError(f"optimizer.parts.{part} is set, but this {self.stage} run trains only {named}; leave it out")
        return self

    @model_validator(mode="after")
    def _plain_asks_nothing(self) -> "RunConfig":
        spec = self.stage_spec
        asked = [task for task, share in spec.mix.items() if share > 0] + list(self.eval.tasks if self.eval.source else ())
        about_regions = sorted({task for task in asked if task in ("bbox2caption", "caption2bbox")})
        if spec.plain and about_regions:
            raise ValueError(
                f"{self.stage} rows are an image and its caption, without a question: data.mix and eval.tasks cannot name "
                f"{', '.join(about_regions)}; with eval.tasks=[] only the held-out loss is computed"
            )
        return self

    def local_micro_batches(self, world: int) -> int:
        """Micro-batches per rank and step; `ValueError` where `world * micro_batch` does not divide the global batch."""
        rows = self.train.global_batch
        per_round = world * self.train.micro_batch
        if rows % per_round:
            fitting = largest_divisor(rows // world, self.train.micro_batch) if rows % world == 0 else None
            resumed = ", and a run can be resumed with it" if self.train.loss_reduction == "global" else ""
            remedy = (
                f"train.micro_batch={fitting} does{resumed}"
                if fitting
                else f"take a number of ranks that divides {rows}, or another train.global_batch"
            )
            raise ValueError(
                f"train.global_batch is {rows} rows; {world} rank(s) x train.micro_batch {self.train.micro_batch} = {per_round} "
                f"rows does not divide it: {remedy}"
            )
        return rows // per_round


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (which is at least 1)."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _unknown_keys(model: type[BaseModel], tree: Any, path: str = "") -> list[str]:
    """One message for each key that `model` does not have, with the nearest valid key."""
    if not isinstance(tree, Mapping):
        return []
    messages = []
    former = model.FORMER_KEYS if issubclass(model, Strict) else {}
    for key, value in tree.items():
        if key in former:
            continue
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {path + near[0]!r}?" if near else f"valid: {', '.join(path + k for k in model.model_fields)}"
            messages.append(f"unknown key {path + str(key)!r}; {hint}")
            continue
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            messages += _unknown_keys(kind, value, f"{path}{key}.")
        members = [member for member in get_args(kind) if isinstance(member, type) and issubclass(member, BaseModel)]
        if members and isinstance(value, list | dict):
            below = enumerate(value) if isinstance(value, list) else value.items()
            messages += [line for name, each in below for line in _unknown_keys(members[0], each, f"{path}{key}.{name}.")]
    return messages


def validate(model: type[Valid], tree: Mapping, origin: str) -> Valid:
    """The tree as a `model`. `ValueError`, in one line, names `origin`, every offending key and the nearest valid key."""
    unknown = _unknown_keys(model, tree)
    if unknown:
        raise ValueError(f"{origin}: " + "; ".join(unknown))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(lines)) from None


def merge(below: dict, above: Mapping, replaced: Collection[str] = ()) -> dict:
    """`below` updated with `above`; nested mappings are merged, except those under the keys `replaced`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in replaced
        merged[key] = merge(merged[key], value, replaced) if both else value
    return merged


def find_config(path: str | Path) -> Path:
    """The file at `path` if it exists, else the file of that name that ships with granvit: `configs/stage1.yaml` is found from
    any directory. `ValueError` names both paths if neither exists."""
    own = CONFIGS.joinpath(*Path(path).parts[1:]) if Path(path).parts[:1] == ("configs",) else None
    if Path(path).exists():
        return Path(path)
    if own is None or not own.is_file():
        beside = "" if own is None else f", nor {own}"
        raise ValueError(f"configuration {path}: no such file{beside}")
    return own


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which PyYAML would use the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and key.value != "<<":
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} is there twice")
            if name is not None:
                seen.add(name)
        return node


def read_yaml(path: str | Path) -> dict:
    """A YAML mapping; `ValueError` names the file (and line) where it is not one, or has a key twice."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        raise ValueError(f"configuration {path}: no such file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ValueError(f"configuration {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"configuration {path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def read_mix(path: Path) -> list[Any]:
    """The sources of a mix (OUT/mixes/NAME.yaml of scripts/build_gran.py); their paths, relative to its folder, become relative
    to the working directory. `ValueError` names the file if it is not a mix."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a mix; for one store write [{{path: {path}}}]")
    sources = read_yaml(path).get("sources")
    if not isinstance(sources, list) or not all(isinstance(s, dict) and isinstance(s.get("path"), str) for s in sources):
        raise ValueError(f"{path}: is not a mix: it needs a list `sources` whose entries have a `path`")
    return [source | {"path": os.path.normpath(path.parent / source["path"])} for source in sources]


def _read_with_base(path: Path) -> dict:
    tree = read_yaml(path)
    base = tree.pop("base", None)
    return tree if base is None else merge(_read_with_base(path.parent / base), tree, replaced=["mix"])


def _state_mix(tree: dict) -> None:
    """Writes the stage's mix into a tree without `data.mix`, so that an override of one share keeps the others."""
    stage, data = STAGES.get(str(tree.get("stage"))), tree.setdefault("data", {})
    if stage is not None and isinstance(data, dict) and data.get("mix") is None:
        data["mix"] = dict(stage.mix)


def _override(tree: dict, assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"override {assignment!r} is not of the form key=value (as in train.steps=50)")
    *parents, leaf = key.split(".")
    if parents == ["data", "mix"]:
        _state_mix(tree)
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {assignment!r}: {parent!r} is not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(
            f"override {assignment!r}: {text!r} is not valid YAML; close its brackets, and quote text with special characters"
        ) from None


def parse_config(tree: Mapping, origin: str) -> RunConfig:
    """Validates a tree of keys. `ValueError` names `origin` and every offending key."""
    return validate(RunConfig, tree, origin)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file (and its bases), applies `key=value` overrides (values are YAML) and validates."""
    tree = _read_with_base(Path(path))
    for assignment in overrides:
        _override(tree, assignment)
    return parse_config(tree, str(path))


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` of that file gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """`key: old -> new` for every key in which two configurations differ."""

    def walk(x: Any, y: Any, path: str) -> list[str]:
        if isinstance(x, dict) and isinstance(y, dict):
            return [line for k in sorted(x.keys() | y.keys()) for line in walk(x.get(k), y.get(k), f"{path}.{k}" if path else k)]
        return [] if x == y else [f"{path}: {x} -> {y}"]

    return walk(a.model_dump(mode="json"), b.model_dump(mode="json"), "")


_NOT_OF_A_MODEL = {
    "name": "a model is named after its file; rename the file",
    "tiles": "tiling is set by the run, as vision.tiling",
}


def _model_config(name: str, kind: type[Valid]) -> Valid:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / "models" / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in (CONFIGS / "models").glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"model {name!r}: no file {path}; {hint}")
    tree = read_yaml(path)
    for key, remedy in _NOT_OF_A_MODEL.items():
        if key in tree:
            raise ValueError(f"{path}: a model's file cannot set {key!r}: {remedy}")
    return validate(kind, {"name": path.stem} | tree, f"{path}: not a {kind.__name__}")


def vision_config(name: str) -> VisionConfig:
    """The encoder called `name` in configs/models, or in the YAML file at that path."""
    return _model_config(name, VisionConfig)


def language_config(name: str) -> LanguageConfig:
    """The decoder called `name` in configs/models, or in the YAML file at that path."""
    return _model_config(name, LanguageConfig)


def resolve_models(config: RunConfig) -> tuple[VisionConfig, LanguageConfig]:
    """The run's encoder (with the blocks that `distill.features` needs and with the run's tiling) and decoder.

    `ValueError` where `distill.crop_size`, `distill.grid` or `vision.tiling` do not fit the encoder's patches.
    """
    vision = vision_config(config.model.vision)
    crop, grid = config.crop_size(vision), config.distill.grid
    if crop % vision.patch_size:
        raise ValueError(f"distill.crop_size {crop} is not a multiple of {vision.name!r}'s patch size {vision.patch_size}")
    if grid and (crop // vision.patch_size) % grid:
        cells = crop // vision.patch_size
        raise ValueError(f"distill.grid {grid} does not divide the teacher's grid of {cells} x {cells} (crops of {crop} pixels)")
    if config.stage_spec.distill and config.distill.features == "final":
        vision = VisionConfig(**{**vision.model_dump(), "built_level": "final"})
    if config.vision.tiling:
        if vision.grid % 2:
            own = f"{vision.name!r} has {vision.grid} x {vision.grid} patches"
            raise ValueError(f"vision.tiling joins 2 x 2 patches into one image token and needs an even grid, but {own}")
        if vision.covered_pixels < vision.image_size:
            uncovered = f"{vision.name!r} ignores the last {vision.image_size - vision.covered_pixels} pixels of each"
            raise ValueError(f"vision.tiling puts tiles edge to edge, but {uncovered}; use another encoder or vision.tiling=0")
        vision = vision.model_copy(update={"tiles": config.vision.tiling})
    return vision, language_config(config.model.language)
