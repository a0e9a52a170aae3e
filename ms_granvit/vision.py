"""VisionEncoder: every encoder row of the paper is one `VisionConfig`.

Layout letters: B images, N patches, C width, R image side.
"""
from pathlib import Path
from typing import Self

import mindspore as ms
from mindspore import Tensor, nn, ops

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.interpolate import position_matrix
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import Level, VisionConfig, vision_shapes
from ms_granvit.arrays import dtype_on_device, fill, to_numpy
from ms_granvit.distributed import use_device
from ms_granvit.layers import Embedding, Linear, activation, linear, norm, parameter, stored_as
from ms_granvit.ops.table import PLAIN, kernels_for
from ms_granvit.taps import Module


class PatchEmbedding(Module):
    """A convolution whose stride is its kernel, as one matrix product over flattened patches. Pixels beyond the last whole patch
    are ignored."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.patch = c.patch_size
        self.weight = parameter(c.width, 3, c.patch_size, c.patch_size)
        self.bias = parameter(c.width) if c.patch_bias else None

    def construct(self, pixels_B3RR: Tensor) -> Tensor:
        B, grid, p = pixels_B3RR.shape[0], pixels_B3RR.shape[2] // self.patch, self.patch
        covered = pixels_B3RR if grid * p == pixels_B3RR.shape[2] else pixels_B3RR[:, :, : grid * p, : grid * p]
        patches = covered.reshape(B, 3, grid, p, grid, p).transpose(0, 2, 4, 1, 3, 5).reshape(B, grid * grid, 3 * p * p)
        return self.emit(linear(patches, self.weight.reshape(self.weight.shape[0], 3 * p * p), self.bias))


class VisionEmbeddings(Module):
    """Patch embeddings, the class token if there is one, and position embeddings."""

    def __init__(self, c: VisionConfig, image_size: int, kernels: Kernels = PLAIN):
        super().__init__()
        self.patch_embedding = PatchEmbedding(c)
        self.patch_norm = norm(c.norm, c.width, c.norm_eps, kernels) if c.patch_norm else None
        self.class_embedding = parameter(c.width) if c.class_token else None
        self.position_embedding = Embedding(c.patches + c.class_token, c.width)
        grid = image_size // c.patch_size
        self.resample = None if grid == c.grid else Tensor(position_matrix(c.grid, grid))

    def resampled(self, table: Tensor) -> Tensor:
        """A table of position embeddings `[N' (+1), C]` resampled to this image size, `[1, N (+1), C]`."""
        if self.resample is not None:
            classes = table.shape[0] - self.resample.shape[1]
            patches = ops.matmul(ops.cast(self.resample, table.dtype), table[classes:])
            table = patches if classes == 0 else ops.cat((table[:classes], patches))
        return ops.expand_dims(table, 0)

    def construct(self, pixels_B3RR: Tensor) -> Tensor:
        x = self.patch_embedding(pixels_B3RR)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.class_embedding is not None:
            B, _, C = x.shape
            x = ops.cat((ops.broadcast_to(ops.cast(self.class_embedding, x.dtype), (B, 1, C)), x), 1)
        return self.emit(x + ops.cast(self.resampled(self.position_embedding.weight), x.dtype))


class VisionAttention(Module):
    """Multi-head self-attention over all tokens of one image."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.heads, self.head_dim = c.heads, c.head_dim
        self.attend = kernels.attention(head_dim=c.head_dim, masked=False, cached=False).attend
        self.q_proj = Linear(c.width, c.width, c.bias)
        self.k_proj = Linear(c.width, c.width, c.bias)
        self.v_proj = Linear(c.width, c.width, c.bias)
        self.out_proj = Linear(c.width, c.width, c.bias)

    def construct(self, x_BNC: Tensor) -> Tensor:
        B, N, C = x_BNC.shape
        q = self.q_proj(x_BNC).reshape(B, N, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k = self.k_proj(x_BNC).reshape(B, N, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x_BNC).reshape(B, N, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        out = self.emit(self.attend(q, k, v, None))
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, N, C))


class VisionMLP(Module):
    """`fc2(act(fc1 x))`, or gated: `fc2(act(gate_proj x) * fc1 x)`."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.activate = activation(c.activation, kernels)
        self.swiglu = kernels.pick("swiglu") if c.gated_mlp and c.activation == "silu" else None
        self.gate_proj = Linear(c.width, c.mlp, c.bias) if c.gated_mlp else None
        self.fc1 = Linear(c.width, c.mlp, c.bias)
        self.fc2 = Linear(c.mlp, c.width, c.bias)

    def construct(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.fc2(self.emit(self.activate(self.fc1(x))))
        gate, up = self.gate_proj(x), self.fc1(x)
        return self.fc2(self.emit(self.activate(gate) * up if self.swiglu is None else self.swiglu(gate, up)))


class VisionBlock(Module):
    """A pre-norm transformer block, with InternViT's layer scale where the configuration has it."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.layer_norm1 = norm(c.norm, c.width, c.norm_eps, kernels)
        self.self_attn = VisionAttention(c, kernels)
        self.layer_norm2 = norm(c.norm, c.width, c.norm_eps, kernels)
        self.mlp = VisionMLP(c, kernels)
        self.layer_scale1 = parameter(c.width) if c.layer_scale else None
        self.layer_scale2 = parameter(c.width) if c.layer_scale else None

    def construct(self, x: Tensor) -> Tensor:
        h = self.self_attn(self.layer_norm1(x))
        if self.layer_scale1 is not None:
            h = h * ops.cast(self.layer_scale1, h.dtype)
        x = x + h
        h = self.mlp(self.layer_norm2(x))
        if self.layer_scale2 is not None:
            h = h * ops.cast(self.layer_scale2, h.dtype)
        return self.emit(x + h)


class VisionBlocks(nn.Cell):
    """Holds the blocks under the canonical path `encoder.layers`."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.layers = nn.CellList([VisionBlock(c, kernels) for _ in range(c.built_layers)])


class VisionEncoder(Module):
    """Patch features of images of one size.

    If `image_size` is not the configuration's, the position embeddings are resampled (bicubic). Blocks above `c.built_level` are
    not built (see `VisionConfig`).
    """

    def __init__(self, c: VisionConfig, dtype: ms.Type, image_size: int | None = None, kernels: Kernels = PLAIN,
                 recompute: bool = False):  # fmt: skip
        super().__init__()
        self.config, self.dtype, self.skip, self.built = c, dtype, int(c.class_token), ", ".join(c.available_levels)
        self.side = c.side(image_size)
        self.takes = f"this encoder takes [B, 3, {self.side}, {self.side}]; load_encoder(..., resolution=SIDE) takes other sides"
        self.embeddings = VisionEmbeddings(c, self.side, kernels)
        self.pre_layernorm = norm(c.norm, c.width, c.norm_eps, kernels) if c.pre_norm else None
        self.encoder = VisionBlocks(c, kernels)
        self.post_layernorm = norm(c.norm, c.width, c.norm_eps, kernels) if c.built_level == "final" else None
        self.level, self.built_level, self.penultimate = c.level, c.built_level, c.layers - 2
        self.mean = Tensor(c.mean, ms.float32).reshape(1, 3, 1, 1)
        self.std = Tensor(c.std, ms.float32).reshape(1, 3, 1, 1)
        if recompute:
            for block in self.encoder.layers:
                block.recompute()

    @classmethod
    def from_pretrained(cls, directory: str | Path, resolution: int | None = None, dtype: ms.Type | None = None,
                        device: str = "auto") -> Self:  # fmt: skip
        """Loads the encoder for evaluation, with all blocks that are stored, from a publisher's directory (any layout that
        `parity/convert.py` reads), a run, or a directory that `save_pretrained` wrote.

        `resolution` is the images' side in pixels (default: the published one), `dtype` that of weights and activations (default:
        the stored one; float32 on CPU). `device` is cpu or npu and holds for the whole process; auto, the default, is the
        accelerator if there is one. A warning names the stored tensors that are not loaded. `ValueError` names the file and the
        tensor, or the key of config.json, that is wrong.
        """
        opened = open_pretrained(directory, "vision")
        device = use_device(device)
        dtype = dtype or dtype_on_device(opened.dtype)
        kernels = kernels_for(device, dtype)
        with stored_as(dtype):
            encoder = cls(opened.vision, dtype, resolution, kernels)
        fill(encoder, opened.tensors, "vision.")
        log_kernels(kernels)
        return encoder

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        tensors = ((f"vision.{name}", to_numpy(parameter)) for name, parameter in self.parameters_and_names())
        write_pretrained(directory, self.config, None, vision_shapes(self.config), tensors)

    def normalise(self, pixels_B3RR: Tensor) -> Tensor:
        """uint8 pixels -> `(x / 255 - mean) / std` in the compute dtype."""
        return ops.cast((ops.cast(pixels_B3RR, ms.float32) / 255 - self.mean) / self.std, self.dtype)

    def levels(self, pixels_B3RR: Tensor) -> dict[str, Tensor]:
        """Normalised pixels -> patch features `[B, N, C]` at every level that is built, without the class token."""
        x = self.embeddings(ops.cast(pixels_B3RR, self.dtype))
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        levels = {}
        for i, block in enumerate(self.encoder.layers):
            x = block(x)
            if i == self.penultimate:
                levels["penultimate"] = self.patches(x)
        if self.built_level != "penultimate":
            levels["last"] = self.patches(x)
        if self.post_layernorm is not None:
            levels["final"] = self.patches(self.post_layernorm(x))
        return levels

    def patches(self, tokens_BNC: Tensor) -> Tensor:
        """The tokens without the class token."""
        return tokens_BNC[:, self.skip :] if self.skip else tokens_BNC

    def encode(self, pixels_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels -> patch features `[B, N, C]` at `config.level` and at `config.built_level`."""
        levels = self.levels(self.normalise(pixels_B3RR))
        return levels[self.level], levels[self.built_level]

    def construct(self, pixels_B3RR: Tensor, level: Level = "penultimate") -> Tensor:
        """Normalised pixels (`(x / 255 - mean) / std`) -> patch features `[B, N, C]`. `ValueError` for images of another size
        and for a level that is not built."""
        if pixels_B3RR.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"the shape of the pixels is wrong: {self.takes}")
        levels = self.levels(pixels_B3RR)
        if level not in levels:
            raise ValueError(f"this encoder has no level '{level}'; it has {self.built}")
        return levels[level]
