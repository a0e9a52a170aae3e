"""Named activations, their gradients, isolated modules and single operators (see `granvit.introspection.Introspection`)."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import LOSSES, StepInputs
from granvit.introspection import INPUTS, Capture, Feed
from granvit.kernels import Kernels
from granvit.models import LanguageConfig, Shapes, VisionConfig
from pt_granvit import language, layers, projector
from pt_granvit.arrays import to_numpy
from pt_granvit.engine import Engine
from pt_granvit.generate import greedy
from pt_granvit.layers import norm
from pt_granvit.ops import roi_align as roi_ops
from pt_granvit.ops.table import kernels_for
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


def _norm(kind: str, x: Tensor, *weights: Tensor, eps: float, kernels: Kernels) -> Tensor:
    module = norm(kind, x.shape[-1], eps, kernels)
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.data = weight
    return module(x)


def _rope(x_BHSD: Tensor, positions_BS: Tensor, theta: float, kernels: Kernels) -> Tensor:
    return kernels.pick("rope")(x_BHSD, *language.rotary(positions_BS, x_BHSD.shape[-1], theta, x_BHSD.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, segments_BS: Tensor | None = None, *, kernels: Kernels) -> Tensor:
    mask, attend = kernels.attention(head_dim=q.shape[-1], masked=segments_BS is not None, cached=False)
    return attend(q, k, v, None if segments_BS is None else mask(segments_BS))


def _roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int, kernels: Kernels) -> Tensor:
    return kernels.pick("roi_align", grid=grid)(features_BHWC, boxes_BK4, grid)


def _cross_entropy(hidden_AC: Tensor, head_VC: Tensor, targets_A: Tensor, weights_A: Tensor, kernels: Kernels) -> Tensor:
    function = kernels.pick("cross_entropy", positions=len(hidden_AC), vocab=len(head_VC), trained=True)
    return function(hidden_AC, head_VC, targets_A.long(), weights_A)


def _pixels(pixels_B3RR: Tensor, dtype: torch.dtype, vision: VisionConfig) -> Tensor:
    return VisionEncoder(vision, dtype).normalise(pixels_B3RR)


def _positions(table_NC: Tensor, vision: VisionConfig, image_size: int) -> Tensor:
    return VisionEmbeddings(vision, image_size).resampled(table_NC)


def _operator(name: str, kernels: Kernels, dtype: torch.dtype, options: dict[str, Any]) -> Callable[..., Tensor]:
    """The operator that `granvit.introspection.Introspection.operate` runs: a function or module that the model itself uses."""
    functions = {
        "roi_align": partial(_roi_align, kernels=kernels),
        "roi_align_tiled": roi_ops.roi_align_tiled,
        "pixel_shuffle": projector.pixel_shuffle,
        "attention": partial(_attention, kernels=kernels),
        "attention_all": partial(_attention, kernels=kernels),
        "rope": partial(_rope, kernels=kernels),
        "swiglu": kernels.pick("swiglu"),
        "cross_entropy": partial(_cross_entropy, kernels=kernels),
        "layer_norm": partial(_norm, "layer", kernels=kernels),
        "rms_norm": partial(_norm, "rms", kernels=kernels),
        "pixels": partial(_pixels, dtype=dtype),
        "positions": _positions,
        **{kind: layers.activation(kind, kernels) for kind in ("gelu", "gelu_tanh", "quick_gelu", "silu")},
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
                named: Mapping[str, str] | None = None, documented: bool = False,
                **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """An operator's output, and the gradients of its first `differentiate` inputs; `cotangent` is the output's gradient.
        `named` names implementations, as `runtime.kernels` does. With `documented` they are those of an NPU in float16, on
        stand-ins that follow CANN's documents (`parity.documented`)."""
        device, dtype = ("npu", torch.float16) if documented else (self.engine.device, self.engine.dtype)
        kernels = kernels_for(device, dtype, {**self.engine.config.runtime.kernels, **(named or {})})
        inputs = [torch.from_numpy(array).to(self.engine.device) for array in arrays]
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        differentiated = [x.requires_grad_() for x in inputs[:differentiate]]
        with torch.device(self.engine.device):  # for tensors that an operator creates
            out = _operator(operator, kernels, dtype, options)(*inputs)
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
