"""AdamW with clipping by global norm over one flat buffer.

Every trained parameter, its gradient and its two moments are views into flat buffers, so the all-reduce, the norm and the
update are each one pass over memory.
"""
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from granvit.config import OptimizerSection
from granvit.models import part_of


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

    def __init__(self, parameters: FlatParameters, config: OptimizerSection):
        self.parameters, self.config = parameters, config
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
        g, m, v = p.gradients, self.first_moment, self.second_moment
        g.mul_((c.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        m.lerp_(g, 1 - c.betas[0])
        v.mul_(c.betas[1]).addcmul_(g, g, value=1 - c.betas[1])
        correction1, correction2 = 1 - c.betas[0] ** step, 1 - c.betas[1] ** step
        denominator = (v / correction2).sqrt_().add_(c.eps)
        for part, share, decay in self.slices:
            rate = learning_rate * share
            if decay:
                p.values[part.start : min(part.stop, p.decayed)].mul_(1 - rate * decay)
            p.values[part].addcdiv_(m[part], denominator[part], value=-rate / correction1)
        g.zero_()
