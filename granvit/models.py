"""Configurations of encoders and decoders, and their parameter names and shapes, for both frameworks.

Each encoder or decoder in the paper's tables is one `VisionConfig` or `LanguageConfig`. Both packages build the same modules from
it, with the parameter names and shapes of `parameter_shapes`. The names follow SigLIP and Qwen2 in transformers.
"""
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

Level = Literal["penultimate", "last", "final"]
LEVELS: tuple[Level, ...] = ("penultimate", "last", "final")


class Strict(BaseModel):
    """A model that rejects unknown keys. `FORMER_KEYS` maps keys in files of earlier versions to the current keys."""

    FORMER_KEYS: ClassVar[dict[str, str]] = {}
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(Strict):
    """One vision transformer.

    `level` is the output that the projector receives: `penultimate` is the output of the last block but one, without the closing
    norm (LLaVA's `hidden_states[-2]`, the paper's choice: its Table 9 counts 26 of SigLIP2's 27 blocks), `last` that of the last
    block, `final` that of the last block after the closing norm. `built_level` is the highest level that is computed (default:
    `level`); distillation may compare features of that level. Blocks above it are not built. Where patches do not cover the whole
    image (SigLIP: 27 patches of 14 pixels in 384), the remaining pixels at the right and lower edge are ignored.

    `tiles` above 0 is the paper's high resolution (A.5): an image becomes one global view and at most `tiles` tiles, each of
    `image_size`, and 2 x 2 neighbouring patches become one image token. The run sets it (`vision.tiling`), not a model's file.
    """

    FORMER_KEYS: ClassVar[dict[str, str]] = {"top": "built_level"}

    name: str
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp: int
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "silu"] = "gelu_tanh"
    gated_mlp: bool = False
    bias: bool = True
    patch_bias: bool = True
    patch_norm: bool = False
    class_token: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    closing_norm: bool = True
    level: Level = "penultimate"
    built_level: Level = "penultimate"  # default: `level`
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    tiles: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_built_level(cls, fields: Any) -> Any:
        """Accepts the former key `top`; sets `built_level` to `level` if it is missing."""
        if not isinstance(fields, dict):
            return fields
        stated = dict(fields)
        if "top" in stated and "built_level" not in stated:
            stated["built_level"] = stated.pop("top")
        if stated.get("built_level") is None:
            stated["built_level"] = stated.get("level", "penultimate")
        return stated

    @model_validator(mode="after")
    def _fits(self) -> "VisionConfig":
        if self.image_size < self.patch_size:
            raise ValueError(f"vision.image_size {self.image_size} is below vision.patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision.width {self.width} is not a multiple of vision.heads {self.heads}")
        if LEVELS.index(self.built_level) < LEVELS.index(self.level):
            raise ValueError(f"vision.built_level {self.built_level!r} is below vision.level {self.level!r}")
        if self.built_level == "final" and not self.closing_norm:
            raise ValueError(f"vision level 'final' needs a closing norm, which {self.name!r} does not have")
        return self

    @property
    def with_all_blocks(self) -> "VisionConfig":
        """The same encoder with all of its blocks built, and the closing norm where it has one."""
        return self.model_copy(update={"built_level": "final" if self.closing_norm else "last"})

    def side(self, resolution: int | None) -> int:
        """The side of input images in pixels: `resolution`, or `image_size` if None. `ValueError` if it is below `patch_size`."""
        if resolution is None:
            return self.image_size
        if resolution < self.patch_size:
            raise ValueError(f"resolution {resolution} is smaller than one patch of {self.name!r}: {self.patch_size} pixels")
        return resolution

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def covered_pixels(self) -> int:
        """Pixels along one side that the patches cover."""
        return self.grid * self.patch_size

    @property
    def patches(self) -> int:
        """Patch tokens of one view (the image, or one of its tiles), without the class token."""
        return self.grid**2

    @property
    def views(self) -> int:
        """Encoder inputs per image: the global view and `tiles` tiles."""
        return self.tiles + 1

    @property
    def view_tokens(self) -> int:
        """Image tokens of one view: the number of its patches, with tiling a quarter of it."""
        return self.patches // 4 if self.tiles else self.patches

    @property
    def image_tokens(self) -> int:
        """Places for image tokens in a row (with tiling, an image of fewer tiles fills only some of them)."""
        return self.views * self.view_tokens

    @property
    def token_width(self) -> int:
        """Width of an image token at the projector's input; with tiling it holds four patches."""
        return 4 * self.width if self.tiles else self.width

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def available_levels(self) -> tuple[Level, ...]:
        """The levels that this encoder computes."""
        return LEVELS[: LEVELS.index(self.built_level) + 1]

    @property
    def built_layers(self) -> int:
        """Number of blocks that `built_level` needs."""
        return self.layers - 1 if self.built_level == "penultimate" else self.layers


class LanguageConfig(Strict):
    """One causal decoder of the Llama family (RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    name: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    chat: Literal["qwen2.5", "llama-3"] = "qwen2.5"

    @model_validator(mode="after")
    def _fits(self) -> "LanguageConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"language.heads {self.heads} is not a multiple of language.kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"language.head_dim {self.head_dim} must be even for rotary embeddings")
        return self

    def is_built_like(self, other: "LanguageConfig") -> bool:
        """Whether the two can have the same weights: everything but name and chat template is equal."""
        return self.model_copy(update={"name": other.name, "chat": other.chat}) == other


Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, n_in: int, n_out: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def _norm(name: str, width: int, kind: str) -> Shapes:
    weight: Shapes = {f"{name}.weight": (width,)}
    return weight | ({f"{name}.bias": (width,)} if kind == "layer" else {})


def vision_shapes(c: VisionConfig, prefix: str = "vision") -> Shapes:
    """Canonical parameter names and shapes of the encoder, in order of execution."""
    e = f"{prefix}.embeddings"
    shapes: Shapes = {f"{e}.patch_embedding.weight": (c.width, 3, c.patch_size, c.patch_size)}
    if c.patch_bias:
        shapes[f"{e}.patch_embedding.bias"] = (c.width,)
    if c.patch_norm:
        shapes |= _norm(f"{e}.patch_norm", c.width, c.norm)
    if c.class_token:
        shapes[f"{e}.class_embedding"] = (c.width,)
    shapes[f"{e}.position_embedding.weight"] = (c.patches + c.class_token, c.width)
    if c.pre_norm:
        shapes |= _norm(f"{prefix}.pre_layernorm", c.width, c.norm)
    for i in range(c.built_layers):
        block = f"{prefix}.encoder.layers.{i}"
        shapes |= _norm(f"{block}.layer_norm1", c.width, c.norm)
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{p}", c.width, c.width, c.bias)
        if c.layer_scale:
            shapes[f"{block}.layer_scale1"] = (c.width,)
        shapes |= _norm(f"{block}.layer_norm2", c.width, c.norm)
        if c.gated_mlp:
            shapes |= _linear(f"{block}.mlp.gate_proj", c.width, c.mlp, c.bias)
        shapes |= _linear(f"{block}.mlp.fc1", c.width, c.mlp, c.bias)
        shapes |= _linear(f"{block}.mlp.fc2", c.mlp, c.width, c.bias)
        if c.layer_scale:
            shapes[f"{block}.layer_scale2"] = (c.width,)
    if c.built_level == "final":
        shapes |= _norm(f"{prefix}.post_layernorm", c.width, c.norm)
    return shapes


def projector_shapes(vision: VisionConfig, language: LanguageConfig) -> Shapes:
    """The two-layer MLP between encoder and decoder (paper section 5.1; LLaVA's mlp2x_gelu)."""
    return _linear("projector.linear_1", vision.token_width, language.width, True) | _linear(
        "projector.linear_2", language.width, language.width, True
    )


def language_shapes(c: LanguageConfig) -> Shapes:
    """Canonical parameter names and shapes of the decoder, in order of execution."""
    m = "language.model"
    shapes: Shapes = {f"{m}.embed_tokens.weight": (c.vocab, c.width)}
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        block = f"{m}.layers.{i}"
        shapes[f"{block}.input_layernorm.weight"] = (c.width,)
        shapes |= _linear(f"{block}.self_attn.q_proj", c.width, q, c.qkv_bias)
        shapes |= _linear(f"{block}.self_attn.k_proj", c.width, kv, c.qkv_bias)
        shapes |= _linear(f"{block}.self_attn.v_proj", c.width, kv, c.qkv_bias)
        shapes |= _linear(f"{block}.self_attn.o_proj", q, c.width, False)
        shapes[f"{block}.post_attention_layernorm.weight"] = (c.width,)
        for p, n_in, n_out in (("gate_proj", c.width, c.mlp), ("up_proj", c.width, c.mlp), ("down_proj", c.mlp, c.width)):
            shapes |= _linear(f"{block}.mlp.{p}", n_in, n_out, False)
    shapes[f"{m}.norm.weight"] = (c.width,)
    if not c.tied_head:
        shapes["language.lm_head.weight"] = (c.vocab, c.width)
    return shapes


def parameter_shapes(vision: VisionConfig, language: LanguageConfig) -> Shapes:
    """Names and shapes of all parameters of a GranViT. Those of the teacher are `vision_shapes(vision, "teacher")`."""
    return vision_shapes(vision) | projector_shapes(vision, language) | language_shapes(language)


PARTS = ("vision", "projector", "language")


def part_of(name: str) -> str:
    """The part (`vision`, `projector`, `language`, `teacher`) that owns a parameter name."""
    return name.split(".", 1)[0]
