"""The MindSpore engine: training steps in static graphs, reading and loading of the training state, generation (see
`granvit.engine.TrainEngine`).

A step launches four graphs: `micro_batch` (forward, backward, accumulate; compiled once per row shape), `reduce` (sum over
the ranks, global norm), `update` (clip, AdamW) and `ema`. Between `reduce` and `update` the host reads loss and norm, once, and
checks that they are finite. Values that change from step to step are tensor inputs, so nothing is compiled again.
"""
from collections.abc import Iterable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from granvit import native
from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import UNDIVIDED, Group, NonFiniteLoss, Ranks, StepInputs, StepResult
from granvit.kernels import COMPOSED, Kernels
from granvit.models import PARTS, LanguageConfig, VisionConfig, part_of
from granvit.stages import Stage
from ms_granvit import distributed
from ms_granvit.arrays import DTYPES, fill, to_numpy, to_tensor
from ms_granvit.compile_cache import CompileCache
from ms_granvit.distill import EMA, distill_sums, teacher_features
from ms_granvit.generate import Decode, Prefill, greedy
from ms_granvit.layers import stored_as
from ms_granvit.model import GranViT
from ms_granvit.objective import caption_sum
from ms_granvit.ops.table import kernels_for
from ms_granvit.optimizer import AdamW, Clear
from ms_granvit.vision import VisionEncoder

WITH_COLLECTIVES = ("reduce", "all_sum")


class Losses(nn.Cell):
    """The loss of one micro-batch, as its share of the global batch's loss, and the terms that are logged."""

    def __init__(self, model: GranViT, teacher: VisionEncoder | None, config: RunConfig, own_grid: int, kernels: Kernels):
        super().__init__(auto_prefix=False)
        self.model, self.teacher = model, teacher
        self.weight, self.loss, self.grid = config.distill.weight, config.distill.loss, config.distill.grid or own_grid
        tiled = model.vision.config.tiles > 0  # `roi_align_tiled`, which is composed
        self.roi_align = kernels.pick("roi_align", grid=self.grid) if teacher is not None and not tiled else None
        positions = config.train.micro_batch * max(bucket.answers for bucket in config.data.buckets)
        fused = kernels.row("cross_entropy", positions=positions, vocab=model.language.config.vocab,
                            trained=model.language.head_weight().requires_grad)  # fmt: skip
        self.cross_entropy = None if fused.name == COMPOSED else kernels.load(fused.function)

    def construct(self, pixels_B3RR, image_weights_B, token_ids_BS, positions_BS, segments_BS, image_positions_BN,
                  answer_positions_BA, answer_targets_BA, answer_weights_BA, tokens, boxes=None, boxes_BK4=None,
                  box_weights_BK=None, crops_BK3rr=None, grids_B2=None):  # fmt: skip
        """Loss, caption loss and distillation loss: the batch's sums divided by `tokens` and `boxes` (see `StepInputs.divisors`).
        Then the summed variance of the teacher's features, not divided."""
        inputs = (pixels_B3RR, image_weights_B, token_ids_BS, positions_BS, segments_BS, image_positions_BN, answer_positions_BA)
        if self.cross_entropy is None:
            logits, built_features = self.model(*inputs)
            caption = caption_sum(logits, answer_targets_BA, answer_weights_BA) / tokens
        else:
            hidden, built_features = self.model.hidden(*inputs)
            caption = self.cross_entropy(hidden.reshape(-1, hidden.shape[-1]), self.model.language.head_weight(),
                                         answer_targets_BA.reshape(-1), answer_weights_BA.reshape(-1)) / tokens  # fmt: skip
        if self.teacher is None:
            return caption, caption, ops.zeros_like(caption), ops.zeros_like(caption)
        target = teacher_features(self.teacher, crops_BK3rr, self.grid)
        distill, variance = distill_sums(built_features, target, boxes_BK4, box_weights_BK, self.loss, grids_B2,
                                         self.roi_align)  # fmt: skip
        distill = distill / boxes
        return caption + self.weight * distill, caption, distill, variance


class MicroBatch(nn.Cell):
    """Forward and backward pass of one micro-batch; adds the gradients to the accumulators. `terms` `[3]` is the running sum of
    caption loss, distillation loss and feature variance. Returns it with this micro-batch's terms added, and this micro-batch's
    loss."""

    def __init__(self, losses: Losses, parameters: ParameterTuple, gradients: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.losses, self.parameters, self.gradients = losses, parameters, gradients
        self.differentiate = ms.value_and_grad(losses, None, parameters, has_aux=True)

    def construct(self, terms: Tensor, *inputs) -> tuple[Tensor, Tensor]:
        (loss, caption, distill, variance), gradients = self.differentiate(*inputs)
        for i in range(len(self.gradients)):
            ops.assign_add(self.gradients[i], gradients[i])
        return terms + ops.stack((caption, distill, variance)), loss


class LossSums(nn.Cell):
    """Forward pass alone. `sums` `[2]`: the running sum of caption and distillation loss; returns it with this batch's added."""

    def __init__(self, losses: Losses):
        super().__init__(auto_prefix=False)
        self.losses = losses

    def construct(self, sums: Tensor, *inputs) -> Tensor:
        _, caption, distill, _ = self.losses(*inputs)
        return sums + ops.stack((caption, distill))


class Engine:
    """`granvit.engine.TrainEngine` over MindSpore, replicated data parallel."""

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], ranks: Ranks | None = None, stage: Stage | None = None):  # fmt: skip
        runtime, stage = config.runtime, stage or config.stage_spec
        self.config = config
        self.ranks = ranks or distributed.join(runtime.device)
        self.rank, self.world, self.device = self.ranks.rank, self.ranks.world, self.ranks.device
        if runtime.compute not in DTYPES or (self.device == "cpu" and runtime.compute != "float32"):
            possible = "float32 on cpu, float32, bfloat16 or float16 on npu"
            raise ValueError(f"runtime.compute {runtime.compute}: MindSpore computes in {possible}; choose one of these")
        ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": runtime.jit_level})
        dtype = DTYPES[runtime.compute]
        self.kernels = kernels_for(self.device, dtype, runtime.kernels)

        with stored_as(dtype):
            self.model = GranViT(vision, language, dtype, self.kernels, runtime.recompute, stage.zero_image_tokens)
        for parameter in self.model.get_parameters():
            parameter.requires_grad = part_of(parameter.name) in stage.trains
            parameter.set_dtype(ms.float32 if parameter.requires_grad else dtype)
        fill(self.model, start)
        self.teacher: VisionEncoder | None = None
        if stage.distill:
            self.teacher = VisionEncoder(vision, dtype, config.crop_size(vision), self.kernels)
            self.teacher.update_parameters_name("teacher.")
            for parameter in self.teacher.get_parameters():
                parameter.requires_grad = False
            students = ((f"teacher.{p.name.split('.', 1)[1]}", to_numpy(p)) for p in self.model.vision.get_parameters())
            fill(self.teacher, students)

        self.trained = ParameterTuple(self.model.trainable_params())
        self.gradients = self.trained.clone("gradient", init="zeros")
        own_grid = config.crop_size(vision) // vision.patch_size
        losses = Losses(self.model, self.teacher, config, own_grid, self.kernels)
        self.micro_batch = MicroBatch(losses, self.trained, self.gradients)
        self.held_out = LossSums(losses)
        self.reduce = distributed.ReduceGradients(self.gradients, self.world)
        self.update, self.clear = AdamW(self.trained, self.gradients, config.optimizer, self.kernels), Clear(self.gradients)
        self.ema = None if self.teacher is None else EMA(self.teacher, self.model.vision)
        self.prefill, self.decode = Prefill(self.model, language), Decode(self.model)
        if runtime.compile_cache:
            cache = CompileCache(runtime.compile_cache, self.rank, graph_settings(config, vision, language, stage, self.kernels))
            for name, graph in self.graphs().items():
                if name not in WITH_COLLECTIVES:
                    cache.attach(name, graph)

    def graphs(self) -> dict[str, nn.Cell]:
        """Every cell that is launched as a graph."""
        graphs = {
            "micro_batch": self.micro_batch, "reduce": self.reduce, "update": self.update, "clear": self.clear, "ema": self.ema,
            "all_sum": self.ranks.sum, "held_out": self.held_out, "prefill": self.prefill, "decode": self.decode,
        }  # fmt: skip
        return {name: graph for name, graph in graphs.items() if graph is not None}

    @property
    def compilations(self) -> dict[str, int]:
        """How many graphs each cell has. MindSpore's own table has one entry for each graph that was compiled or loaded."""
        return {name: len(graph.compile_cache) for name, graph in self.graphs().items() if graph.compile_cache}

    memory = staticmethod(distributed.memory)
    join = staticmethod(distributed.join)

    def step(self, micro_batches: Sequence[Batch], step_inputs: StepInputs) -> StepResult:
        """Forward and backward over the micro-batches, sum over ranks, clip, AdamW, EMA.

        The host reads from the device once, before the update. If loss or gradient norm is not finite, no weight is changed, the
        host also reads the micro-batches' losses, and `NonFiniteLoss` lists this rank's micro-batches that are not finite.
        """
        terms, own_losses = Tensor(np.zeros(3, np.float32)), []
        for batch in micro_batches:
            terms, loss_of_batch = self.micro_batch(terms, *self.inputs(batch, step_inputs))
            own_losses.append(loss_of_batch)
        terms_and_norm, grad_norm = self.reduce(terms)
        caption, distill, variance, norm = terms_and_norm.asnumpy().tolist()
        loss = caption + self.config.distill.weight * distill
        if not np.isfinite([loss, norm]).all():
            self.clear(scalar(0.0))
            culprits = [i for i, loss_of_batch in enumerate(own_losses) if not np.isfinite(loss_of_batch.asnumpy())]
            raise NonFiniteLoss(f"loss {loss}, gradient norm {norm}", culprits)
        c, t = self.config.optimizer, step_inputs.step
        own_rates, decays = np.array([c.of_part(part) for part in PARTS]).T
        rates = step_inputs.learning_rate * (own_rates / c.lr)
        per_part = (1 - rates * decays, rates / (1 - c.betas[0] ** t))
        self.update(*(Tensor(values.astype(np.float32)) for values in per_part), scalar(1 - c.betas[1] ** t), grad_norm)
        if self.ema is not None:
            self.ema(scalar(step_inputs.alpha), scalar(1 - step_inputs.alpha))
        return StepResult(loss, caption, distill, norm, (variance / max(step_inputs.boxes, 1)) ** 0.5)

    def inputs(self, batch: Batch, step_inputs: StepInputs) -> list[Tensor]:
        tokens, boxes = map(np.float32, step_inputs.divisors(batch))
        arrays = [
            batch.pixels_B3RR, batch.image_weights_B, batch.token_ids_BS, batch.positions_BS, batch.segments_BS,
            batch.image_positions_BN, batch.answer_positions_BA, batch.answer_targets_BA, batch.answer_weights_BA,
            tokens,
        ]  # fmt: skip
        if self.teacher is not None:
            arrays += [boxes, batch.boxes_BK4, batch.box_weights_BK, batch.crops_BK3rr]
            arrays += [] if batch.grids_B2 is None else [batch.grids_B2]
        return [Tensor(array) for array in arrays]

    def loss_sums(self, micro_batches: Iterable[Batch]) -> np.ndarray:
        """Caption loss summed over tokens, distillation loss summed over boxes, `[2]`; the host reads from the device once."""
        sums = Tensor(np.zeros(2, np.float32))
        for batch in micro_batches:
            sums = self.held_out(sums, *self.inputs(batch, UNDIVIDED))
        return sums.asnumpy()

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks."""
        return self.ranks.all_sum(values)

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of one group's tensors; the names are those of the parameters."""
        for name, parameter in self._group(group).items():
            yield name, to_numpy(parameter)

    def load(self, group: Group, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replaces one group's tensors."""
        parameters = self._group(group)
        for name, array in tensors:
            parameters[name].set_data(to_tensor(array, parameters[name].dtype))

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> np.ndarray:
        """Greedy continuation, int32 `[B, max_new_tokens]`."""
        return greedy(self.prefill, self.decode, prompts, max_new_tokens, stop_token)

    def close(self) -> None:
        """Leaves the process group."""
        self.ranks.leave()

    def _group(self, group: Group) -> dict[str, Parameter]:
        if group == "model":
            return {p.name: p for p in self.model.get_parameters()}
        if group == "teacher":
            return {} if self.teacher is None else {p.name: p for p in self.teacher.get_parameters()}
        moments = self.update.first_moment if group == "first_moment" else self.update.second_moment
        return {p.name.removeprefix(f"{group}."): p for p in moments}


def graph_settings(config: RunConfig, vision: VisionConfig, language: LanguageConfig, stage: Stage, kernels: Kernels) -> dict:
    """Everything that the engine's graphs depend on, besides the shapes of their inputs (JSON types)."""
    return {
        "device": kernels.device,
        "kernels": kernels.names,
        "native library": native.identity(),
        "stage": {"trains": sorted(stage.trains), "distill": stage.distill, "zero_image_tokens": stage.zero_image_tokens},
        "vision": vision.model_dump(),
        "language": language.model_dump(),
        "distill": config.distill.model_dump(),
        "optimizer": config.optimizer.model_dump(),
        "runtime": config.runtime.model_dump(exclude={"compile_cache"}),
    }


def scalar(value: float) -> Tensor:
    """A float32 tensor of shape `()`."""
    return Tensor(np.float32(value))
