"""Named activations, their gradients, isolated modules and single operators (see `granvit.introspection.Introspection`)."""
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import LOSSES, StepInputs
from granvit.introspection import INPUTS, Capture, Feed
from granvit.models import LanguageConfig, Shapes, VisionConfig
from pt_granvit import language, layers, projector
from pt_granvit.arrays import DTYPES, to_numpy
from pt_granvit.engine import Engine
from pt_granvit.generate import greedy
from pt_granvit.layers import norm
from pt_granvit.ops import attention as attention_ops
from pt_granvit.ops import roi_align as roi_ops
from pt_granvit.taps import Module, Tap
from pt_granvit.vision import VisionEmbeddings, VisionEncoder


def tapped_modules(engine: Engine, names: Iterable[str]) -> dict[str, Module]:
    """The module that makes each named activation; `AttributeError` for an unknown name."""

    def find(name: str) -> nn.Module:
        if name == INPUTS:
            return engine.model
        if name.startswith("teacher."):
            return engine.teacher.get_submodule(name.removeprefix("teacher."))
        return engine.model.get_submodule(name)

    return {name: find(name) for name in names}


def _norm(kind: str, x: Tensor, *weights: Tensor, eps: float) -> Tensor:
    module = norm(kind, x.shape[-1], eps)
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.data = weight
    return module(x)


def _rope(x_BHSD: Tensor, positions_BS: Tensor, theta: float) -> Tensor:
    return language.rotate(x_BHSD, *language.rotary(positions_BS, x_BHSD.shape[-1], theta, x_BHSD.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, segments_BS: Tensor, implementation: str) -> Tensor:
    return attention_ops.attention(q, k, v, attention_ops.shared_prefix_mask(segments_BS), implementation)


def _pixels(pixels_B3RR: Tensor, dtype: torch.dtype, vision: VisionConfig) -> Tensor:
    return VisionEncoder(vision, dtype).normalise(pixels_B3RR)


def _positions(table_NC: Tensor, vision: VisionConfig, image_size: int) -> Tensor:
    return VisionEmbeddings(vision, image_size).resampled(table_NC)


def _operator(name: str, config: RunConfig, device: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """The operator that `granvit.introspection.Introspection.operate` runs: a function or module that the model itself uses."""
    dtype = DTYPES[config.runtime.compute]
    implementation = attention_ops.choose(config.runtime.attention, device, dtype)
    functions = {
        "roi_align": roi_ops.roi_align,
        "roi_align_tiled": roi_ops.roi_align_tiled,
        "pixel_shuffle": projector.pixel_shuffle,
        "attention": partial(_attention, implementation=implementation),
        "attention_all": lambda q, k, v: attention_ops.attention(q, k, v, None, implementation),
        "rope": _rope,
        "layer_norm": partial(_norm, "layer"),
        "rms_norm": partial(_norm, "rms"),
        "pixels": partial(_pixels, dtype=dtype),
        "positions": _positions,
        **{kind: partial(layers.activate, kind) for kind in ("gelu", "gelu_tanh", "quick_gelu", "silu")},
    }
    return partial(functions[name], **options)


class Introspector:
    """`granvit.introspection.Introspection` over PyTorch. It runs eagerly; `graph` has no effect."""

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], shapes: Shapes, graph: bool = True):  # fmt: skip
        self.engine = Engine(config, vision, language, start)
        self.engine.model.requires_grad_(True)
        self.modules = tapped_modules(self.engine, shapes)

    def capture(self, batch: Batch, feed: Feed | None = None, backward: bool = True) -> Capture:
        """Forward and backward pass over one batch; `feed` replaces the values and gradients of the activations it names."""
        for name, module in self.modules.items():
            module.tap = Tap((feed or {}).get(name))
        taps = {name: module.tap for name, module in self.modules.items()}
        try:
            losses = self.engine.losses(batch, StepInputs(1, 0.0, 0.0, batch.tokens, batch.boxes))
        finally:
            for module in self.modules.values():
                module.tap = None
        probed = {name: tap.probe for name, tap in taps.items() if not name.startswith("teacher.")} if backward else {}
        weights = dict(self.engine.model.named_parameters()) if backward else {}
        differentiated = [*probed.values(), *weights.values()]
        gradients = torch.autograd.grad(losses[0], differentiated, allow_unused=True, materialize_grads=True) if backward else ()
        gradients = [to_numpy(g) for g in gradients]
        return Capture(
            losses={name: term.item() for name, term in zip(LOSSES, losses, strict=False)},
            activations={name: to_numpy(tap.value) for name, tap in taps.items()},
            activation_gradients=dict(zip(probed, gradients, strict=False)),
            parameter_gradients=dict(zip(weights, gradients[len(probed) :], strict=True)),
        )

    def operate(self, operator: str, arrays: Sequence[np.ndarray], cotangent: np.ndarray, differentiate: int,
                **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """An operator's output, and the gradients of its first `differentiate` inputs; `cotangent` is the output's gradient."""
        inputs = [torch.from_numpy(array).to(self.engine.device) for array in arrays]
        inputs = [x.to(self.engine.dtype) if x.is_floating_point() else x for x in inputs]
        differentiated = [x.requires_grad_() for x in inputs[:differentiate]]
        with torch.device(self.engine.device):  # for tensors that an operator creates
            out = _operator(operator, self.engine.config, self.engine.device, options)(*inputs)
        if not differentiated:
            return to_numpy(out), []
        gradients = torch.autograd.grad(out, differentiated, torch.from_numpy(cotangent).to(out))
        return to_numpy(out), [to_numpy(g) for g in gradients]

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy continuation, and the logits `[B, T, V]` of its steps."""
        steps: list[np.ndarray] = []
        model, device = self.engine.model, self.engine.device
        tokens = greedy(model, prompts, max_new_tokens, stop_token, device, lambda logits: steps.append(to_numpy(logits)))
        return tokens, np.stack(steps, 1)
