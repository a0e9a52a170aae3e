"""Named activations, their gradients, isolated modules and single operators (see `granvit.introspection.Introspection`)."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import LOSSES, StepInputs
from granvit.introspection import INPUTS, Capture, Feed
from granvit.kernels import Kernels
from granvit.models import LanguageConfig, Shapes, VisionConfig
from ms_granvit import language, layers, projector
from ms_granvit.arrays import DTYPES, to_numpy, to_tensor
from ms_granvit.engine import Engine
from ms_granvit.generate import greedy
from ms_granvit.ops import roi_align as roi_ops
from ms_granvit.ops.table import kernels_for
from ms_granvit.taps import Module, Tap
from ms_granvit.vision import VisionEmbeddings, VisionEncoder


class Differentiated(nn.Cell):
    """The loss terms, and the gradients of the first one, the total loss."""

    def __init__(self, losses: nn.Cell, parameters: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.losses = losses
        self.differentiate = ms.value_and_grad(losses, None, parameters, has_aux=True)

    def construct(self, *inputs):
        return self.differentiate(*inputs)


def tapped_modules(engine: Engine, names: Iterable[str]) -> dict[str, Module]:
    """The module that makes each named activation; `KeyError` for an unknown name."""
    cells = {name: cell for name, cell in engine.model.cells_and_names() if name}
    cells[INPUTS] = engine.model
    if engine.teacher is not None:
        cells |= {f"teacher.{name}": cell for name, cell in engine.teacher.cells_and_names() if name}
    return {name: cells[name] for name in names}


class Norm(nn.Cell):
    def __init__(self, kind: str, width: int, eps: float, kernels: Kernels):
        super().__init__()
        self.norm = layers.norm(kind, width, eps, kernels)

    def construct(self, x: Tensor, *weights: Tensor) -> Tensor:
        return self.norm(x)


class Rope(nn.Cell):
    def __init__(self, head_dim: int, theta: float, dtype: ms.Type, kernels: Kernels):
        super().__init__()
        self.rotary, self.rotate = language.Rotary(head_dim, theta, dtype), kernels.pick("rope")

    def construct(self, x_BHSD: Tensor, positions_BS: Tensor) -> Tensor:
        cos, sin = self.rotary(positions_BS)
        return self.rotate(x_BHSD, cos, sin)


class Attention(nn.Cell):
    def __init__(self, head_dim: int, masked: bool, kernels: Kernels):
        super().__init__()
        self.mask, self.attend = kernels.attention(head_dim=head_dim, masked=masked, cached=False)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, segments_BS: Tensor | None = None) -> Tensor:
        mask = None if segments_BS is None else self.mask(segments_BS)
        return self.attend(q, k, v, mask)


class RoiAlign(nn.Cell):
    def __init__(self, grid: int, kernels: Kernels):
        super().__init__()
        self.grid, self.roi_align = grid, kernels.pick("roi_align", grid=grid)

    def construct(self, features_BHWC: Tensor, boxes_BK4: Tensor) -> Tensor:
        return self.roi_align(features_BHWC, boxes_BK4, self.grid)


class RoiAlignTiled(nn.Cell):
    def __init__(self, grid: int):
        super().__init__()
        self.grid = grid

    def construct(self, tiles_BTHWC: Tensor, grids_B2: Tensor, boxes_BK4: Tensor) -> Tensor:
        return roi_ops.roi_align_tiled(tiles_BTHWC, grids_B2, boxes_BK4, self.grid)


class PixelShuffle(nn.Cell):
    def construct(self, features_BNC: Tensor) -> Tensor:
        return projector.pixel_shuffle(features_BNC)


class Pixels(nn.Cell):
    def __init__(self, vision: VisionConfig, dtype: ms.Type):
        super().__init__()
        self.encoder = VisionEncoder(vision, dtype)

    def construct(self, pixels_B3RR: Tensor) -> Tensor:
        return self.encoder.normalise(pixels_B3RR)


class Positions(nn.Cell):
    """A table of position embeddings resampled to `image_size`."""

    def __init__(self, vision: VisionConfig, image_size: int):
        super().__init__()
        self.embeddings = VisionEmbeddings(vision, image_size)

    def construct(self, table_NC: Tensor) -> Tensor:
        return self.embeddings.resampled(table_NC)


class Function(nn.Cell):
    """A function of tensors."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def construct(self, *arrays: Tensor) -> Tensor:
        return self.function(*arrays)


class Weighted(nn.Cell):
    """The sum of an operator's output times a cotangent, and the output itself."""

    def __init__(self, operator: nn.Cell):
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, cotangent: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        out = self.operator(*arrays)
        return ops.sum(ops.cast(out, ms.float32) * cotangent), out


def _operator(name: str, kernels: Kernels, dtype: ms.Type, arrays: Sequence[np.ndarray], options: dict[str, Any]) -> nn.Cell:
    """The operator that `granvit.introspection.Introspection.operate` runs: a function or cell that the model itself uses."""
    if name in ("layer_norm", "rms_norm"):
        cell = Norm(name.removesuffix("_norm"), arrays[0].shape[-1], **options, kernels=kernels)
        for parameter, weight in zip(cell.get_parameters(), arrays[1:], strict=True):
            parameter.set_data(to_tensor(weight, ms.float32))
        return cell
    makers = {
        "roi_align": partial(RoiAlign, kernels=kernels),
        "roi_align_tiled": RoiAlignTiled,
        "pixel_shuffle": PixelShuffle,
        "attention": lambda: Attention(arrays[0].shape[-1], True, kernels),
        "attention_all": lambda: Attention(arrays[0].shape[-1], False, kernels),
        "rope": lambda theta: Rope(arrays[0].shape[-1], theta, dtype, kernels),
        "swiglu": lambda: Function(kernels.pick("swiglu")),
        "cross_entropy": lambda: Function(kernels.pick("cross_entropy", positions=len(arrays[0]), vocab=len(arrays[1]),
                                                       trained=True)),
        "pixels": lambda vision: Pixels(vision, dtype),
        "positions": Positions,
        **{kind: partial(Function, layers.activation(kind, kernels)) for kind in ("gelu", "gelu_tanh", "quick_gelu", "silu")},
    }
    return makers[name](**options)


class Introspector:
    """`granvit.introspection.Introspection` over MindSpore, in graph mode, or in PyNative mode if `graph` is False."""

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], shapes: Shapes, graph: bool = True):  # fmt: skip
        self.engine = Engine(config, vision, language, start)
        self.mode = ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE
        self.dtype = DTYPES[config.runtime.compute]
        self.weights = ParameterTuple(self.engine.model.get_parameters())  # before the taps add their own parameters
        self.taps: dict[str, Tap] = {}
        for name, module in tapped_modules(self.engine, shapes).items():
            module.tap = self.taps[name] = Tap(shapes[name], self.dtype)
            module.tap.update_parameters_name(f"{name}.")
        for weight in self.weights:
            weight.requires_grad = True
        probes = ParameterTuple([tap.probe for name, tap in self.taps.items() if not name.startswith("teacher.")])
        self.differentiated = Differentiated(self.engine.micro_batch.losses, self.weights + probes)

    def capture(self, batch: Batch, feed: Feed | None = None, backward: bool = True) -> Capture:
        """Forward and backward pass over one batch; `feed` replaces the values and gradients of the activations it names."""
        for name, tap in self.taps.items():
            tap.feed((feed or {}).get(name))
        inputs = self.engine.inputs(batch, StepInputs(1, 0.0, 0.0, batch.tokens, batch.boxes))
        ms.set_context(mode=self.mode)
        try:
            losses, gradients = self.differentiated(*inputs) if backward else (self.engine.micro_batch.losses(*inputs), ())
        finally:
            ms.set_context(mode=ms.GRAPH_MODE)
        names = [p.name for p in self.weights] if backward else []
        weight_gradients = {name: to_numpy(g) for name, g in zip(names, gradients, strict=False)}
        probed = [name for name in self.taps if not name.startswith("teacher.")] if backward else []
        return Capture(
            losses={name: float(term.asnumpy()) for name, term in zip(LOSSES, losses, strict=False)},
            activations={name: to_numpy(tap.value) for name, tap in self.taps.items()},
            activation_gradients={name: to_numpy(g) for name, g in zip(probed, gradients[len(names) :], strict=True)},
            parameter_gradients=weight_gradients,
        )

    def operate(self, operator: str, arrays: Sequence[np.ndarray], cotangent: np.ndarray, differentiate: int,
                named: Mapping[str, str] | None = None, documented: bool = False,
                **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """An operator's output, and the gradients of its first `differentiate` inputs; `cotangent` is the output's gradient.
        `named` names implementations, as `runtime.kernels` does. With `documented` they are those of an NPU in float16, on
        stand-ins that follow CANN's documents (`parity.documented`)."""
        device, dtype = ("npu", ms.float16) if documented else (self.engine.device, self.dtype)
        kernels = kernels_for(device, dtype, {**self.engine.config.runtime.kernels, **(named or {})})
        cell = _operator(operator, kernels, dtype, arrays, options)
        inputs = [to_tensor(a, dtype) if a.dtype.kind == "f" else Tensor(a) for a in arrays]
        ms.set_context(mode=self.mode)
        try:
            if not differentiate:
                return to_numpy(cell(*inputs)), []
            positions = tuple(range(1, differentiate + 1))
            (_, out), gradients = ms.value_and_grad(Weighted(cell), positions, None, has_aux=True)(
                to_tensor(cotangent, ms.float32), *inputs
            )
        finally:
            ms.set_context(mode=ms.GRAPH_MODE)
        return to_numpy(out), [to_numpy(g) for g in (gradients if isinstance(gradients, tuple) else (gradients,))]

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy continuation, and the logits `[B, T, V]` of its steps."""
        assert not self.taps, "generation needs an Introspector without taps, whose shapes are those of a training batch"
        steps: list[np.ndarray] = []
        prefill, decode = self.engine.prefill, self.engine.decode
        tokens = greedy(prefill, decode, prompts, max_new_tokens, stop_token, lambda logits: steps.append(to_numpy(logits)))
        return tokens, np.concatenate(steps, 1)
