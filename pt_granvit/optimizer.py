"""AdamW with clipping by global norm over one flat buffer.

Every trained parameter, its gradient and its two moments are views into flat buffers, so the all-reduce, the norm and the
update are each one pass over memory.
"""
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from granvit.config import OptimizerSection
from granvit.kernels import Kernels
from granvit.models import part_of
from pt_granvit.ops.table import PLAIN


class FlatParameters:
    """Moves parameters into one flat buffer. Those of two or more axes come first, because only they decay."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        self.named = sorted(named, key=lambda pair: pair[1].ndim < 2)
        sizes = [p.numel() for _, p in self.named]
        self.decayed = sum(p.numel() for _, p in self.named if p.ndim >= 2)
        like = self.named[0][1] if self.named else torch.empty(0)
        self.values = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        for (_, parameter), value, gradient in zip(
            self.named, self.values.split(sizes), self.gradients.split(sizes), strict=True
        ):
            value.copy_(parameter.detach().reshape(-1))
            parameter.data = value.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm, tensor by tensor: on CPU, one float32 sum over millions of elements is wrong in its fourth digit."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for _, p in self.named])))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer with the names and shapes of the parameters."""
        sizes = [p.numel() for _, p in self.named]
        return {name: part.view(p.shape) for (name, p), part in zip(self.named, flat.split(sizes), strict=True)}


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected, on float32 master weights. Only parameters of
    two or more axes decay. Parts may have their own learning rate and decay."""

    def __init__(self, parameters: FlatParameters, config: OptimizerSection, kernels: Kernels = PLAIN):
        self.parameters, self.config, self.move = parameters, config, kernels.pick("adamw")
        self.first_moment = torch.zeros_like(parameters.values)
        self.second_moment = torch.zeros_like(parameters.values)
        self.slices: list[tuple[slice, float, float]] = []  # of the flat buffer, factor of the learning rate, decay
        first = 0
        for (rate, decay), members in groupby(parameters.named, lambda named: config.of_part(part_of(named[0]))):
            last = first + sum(p.numel() for _, p in members)
            self.slices.append((slice(first, last), rate / config.lr, decay))
            first = last

    @torch.no_grad()
    def step(self, step: int, learning_rate: float, grad_norm: Tensor) -> None:
        """One update from the accumulated gradients, which are clipped to `clip_norm` and then zeroed.

        `step` counts updates from 1; `learning_rate` is the value of `optimizer.lr` at this step of the schedule.
        """
        c, p = self.config, self.parameters
        p.gradients.mul_((c.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        buffers = p.values, p.gradients, self.first_moment, self.second_moment
        correction1, correction2 = 1 - c.betas[0] ** step, 1 - c.betas[1] ** step
        for part, share, decay in self.slices:
            rate = learning_rate * share
            border = min(max(p.decayed, part.start), part.stop)  # vectors come after it and do not decay
            for piece, factor in ((slice(part.start, border), 1 - rate * decay), (slice(border, part.stop), None)):
                self.move(*(buffer[piece] for buffer in buffers), factor if decay else None, rate / correction1, correction2,
                          *c.betas, c.eps)  # fmt: skip
        p.gradients.zero_()
