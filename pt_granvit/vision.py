"""VisionEncoder: every encoder row of the paper is one `VisionConfig`.

Layout letters: B images, N patches, C width, R image side.
"""
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.interpolate import position_matrix
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import Level, VisionConfig, vision_shapes
from pt_granvit.arrays import DTYPES, fill, to_numpy
from pt_granvit.distributed import choose_device
from pt_granvit.layers import Embedding, Linear, activation, norm, parameter, stored_as
from pt_granvit.ops.table import PLAIN, kernels_for
from pt_granvit.taps import Module


class PatchEmbedding(Module):
    """A convolution whose stride is its kernel, as one matrix product over flattened patches. Pixels beyond the last whole patch
    are ignored."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.patch = c.patch_size
        self.weight = parameter(c.width, 3, c.patch_size, c.patch_size)
        self.bias = parameter(c.width) if c.patch_bias else None

    def forward(self, pixels_B3RR: Tensor) -> Tensor:
        B, grid, p = pixels_B3RR.shape[0], pixels_B3RR.shape[2] // self.patch, self.patch
        covered = pixels_B3RR[:, :, : grid * p, : grid * p]
        patches = covered.reshape(B, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).reshape(B, grid * grid, 3 * p * p)
        weight = self.weight.reshape(self.weight.shape[0], -1).to(patches.dtype)
        bias = None if self.bias is None else self.bias.to(patches.dtype)
        return self.emit(torch.nn.functional.linear(patches, weight, bias))


class VisionEmbeddings(Module):
    """Patch embeddings, the class token if there is one, and position embeddings."""

    def __init__(self, c: VisionConfig, image_size: int, kernels: Kernels = PLAIN):
        super().__init__()
        self.patch_embedding = PatchEmbedding(c)
        self.patch_norm = norm(c.norm, c.width, c.norm_eps, kernels) if c.patch_norm else None
        self.class_embedding = parameter(c.width) if c.class_token else None
        self.position_embedding = Embedding(c.patches + c.class_token, c.width)
        grid = image_size // c.patch_size
        resample = None if grid == c.grid else torch.tensor(position_matrix(c.grid, grid))  # on torch.device
        self.register_buffer("resample", resample, persistent=False)

    def resampled(self, table: Tensor) -> Tensor:
        """A table of position embeddings `[N' (+1), C]` resampled to this image size, `[1, N (+1), C]`."""
        if self.resample is None:
            return table[None]
        classes = table.shape[0] - self.resample.shape[1]
        return torch.cat([table[:classes], self.resample.to(table.dtype) @ table[classes:]])[None]

    def forward(self, pixels_B3RR: Tensor) -> Tensor:
        x = self.patch_embedding(pixels_B3RR)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return self.emit(x + self.resampled(self.position_embedding.weight).to(x.dtype))


class VisionAttention(Module):
    """Multi-head self-attention over all tokens of one image."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.heads = c.heads
        self.attend = kernels.attention(head_dim=c.head_dim, masked=False, cached=False).attend
        self.q_proj = Linear(c.width, c.width, c.bias)
        self.k_proj = Linear(c.width, c.width, c.bias)
        self.v_proj = Linear(c.width, c.width, c.bias)
        self.out_proj = Linear(c.width, c.width, c.bias)

    def forward(self, x_BNC: Tensor) -> Tensor:
        q, k, v = (p(x_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.emit(self.attend(q, k, v, None))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(Module):
    """`fc2(act(fc1 x))`, or gated: `fc2(act(gate_proj x) * fc1 x)`."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.activate = activation(c.activation, kernels)
        self.swiglu = kernels.pick("swiglu") if c.gated_mlp and c.activation == "silu" else None
        self.gate_proj = Linear(c.width, c.mlp, c.bias) if c.gated_mlp else None
        self.fc1 = Linear(c.width, c.mlp, c.bias)
        self.fc2 = Linear(c.mlp, c.width, c.bias)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        h = self.self_attn(self.layer_norm1(x))
        x = x + (h if self.layer_scale1 is None else h * self.layer_scale1.to(h.dtype))
        h = self.mlp(self.layer_norm2(x))
        return self.emit(x + (h if self.layer_scale2 is None else h * self.layer_scale2.to(h.dtype)))


class VisionBlocks(nn.Module):
    """Holds the blocks under the canonical path `encoder.layers`."""

    def __init__(self, c: VisionConfig, kernels: Kernels):
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(c, kernels) for _ in range(c.built_layers))


class VisionEncoder(Module):
    """Patch features of images of one size.

    If `image_size` is not the configuration's, the position embeddings are resampled (bicubic). Blocks above `c.built_level` are
    not built (see `VisionConfig`).
    """

    def __init__(self, c: VisionConfig, dtype: torch.dtype, image_size: int | None = None, kernels: Kernels = PLAIN,
                 recompute: bool = False):  # fmt: skip
        super().__init__()
        self.config, self.dtype, self.recompute, self.built = c, dtype, recompute, ", ".join(c.available_levels)
        self.side = c.side(image_size)
        self.takes = f"this encoder takes [B, 3, {self.side}, {self.side}]; load_encoder(..., resolution=SIDE) takes other sides"
        self.embeddings = VisionEmbeddings(c, self.side, kernels)
        self.pre_layernorm = norm(c.norm, c.width, c.norm_eps, kernels) if c.pre_norm else None
        self.encoder = VisionBlocks(c, kernels)
        self.post_layernorm = norm(c.norm, c.width, c.norm_eps, kernels) if c.built_level == "final" else None
        self.register_buffer("mean", torch.tensor(c.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).reshape(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, directory: str | Path, resolution: int | None = None, dtype: torch.dtype | None = None,
                        device: str = "auto") -> Self:  # fmt: skip
        """Loads the encoder for evaluation, with all blocks that are stored, from a publisher's directory (any layout that
        `parity/convert.py` reads), a run, or a directory that `save_pretrained` wrote.

        `resolution` is the images' side in pixels (default: the published one), `dtype` that of weights and activations (default:
        the stored one). `device`, where weights and pixels must be, is cpu, cuda or npu; auto, the default, is the
        accelerator if there is one. A warning names the stored tensors that are not loaded. `ValueError` names the file and the
        tensor, or the key of config.json, that is wrong.
        """
        opened = open_pretrained(directory, "vision")
        dtype = dtype or DTYPES[opened.dtype]
        device = choose_device(device)
        kernels = kernels_for(device, dtype)
        with torch.device(device), stored_as(dtype):
            encoder = cls(opened.vision, dtype, resolution, kernels)
        fill(encoder, opened.tensors, "vision.")
        log_kernels(kernels)
        return encoder.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        tensors = ((f"vision.{name}", to_numpy(parameter)) for name, parameter in self.named_parameters())
        write_pretrained(directory, self.config, None, vision_shapes(self.config), tensors)

    def normalise(self, pixels_B3RR: Tensor) -> Tensor:
        """uint8 pixels -> `(x / 255 - mean) / std` in the compute dtype."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        return ((pixels_B3RR.to(exact) / 255 - self.mean.to(exact)) / self.std.to(exact)).to(self.dtype)

    def levels(self, pixels_B3RR: Tensor) -> dict[str, Tensor]:
        """Normalised pixels -> patch features `[B, N, C]` at every level that is built, without the class token."""
        x = self.embeddings(pixels_B3RR.to(self.dtype))
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        levels = {}
        for i, block in enumerate(self.encoder.layers):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
            if i == self.config.layers - 2:
                levels["penultimate"] = x
        if self.config.built_level != "penultimate":
            levels["last"] = x
        if self.post_layernorm is not None:
            levels["final"] = self.post_layernorm(x)
        skip = int(self.config.class_token)
        return {level: features[:, skip:] for level, features in levels.items()}

    def encode(self, pixels_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels -> patch features `[B, N, C]` at `config.level` and at `config.built_level`."""
        levels = self.levels(self.normalise(pixels_B3RR))
        return levels[self.config.level], levels[self.config.built_level]

    def forward(self, pixels_B3RR: Tensor, level: Level = "penultimate") -> Tensor:
        """Normalised pixels (`(x / 255 - mean) / std`) -> patch features `[B, N, C]`. `ValueError` for images of another size
        and for a level that is not built."""
        if pixels_B3RR.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"the shape of the pixels is wrong: {self.takes}")
        levels = self.levels(pixels_B3RR)
        if level not in levels:
            raise ValueError(f"this encoder has no level '{level}'; it has {self.built}")
        return levels[level]
