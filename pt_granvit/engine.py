"""The PyTorch engine: training steps, reading and loading of the training state, generation (see
`granvit.engine.TrainEngine`)."""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import UNDIVIDED, Group, NonFiniteLoss, Ranks, StepInputs, StepResult
from granvit.kernels import COMPOSED
from granvit.models import LanguageConfig, VisionConfig, part_of
from granvit.stages import Stage
from pt_granvit import distributed
from pt_granvit.arrays import DTYPES, fill, to_numpy, to_tensor
from pt_granvit.distill import distill_sums, ema_, teacher_features
from pt_granvit.generate import greedy
from pt_granvit.model import GranViT
from pt_granvit.objective import caption_sum
from pt_granvit.ops.table import kernels_for
from pt_granvit.optimizer import AdamW, FlatParameters
from pt_granvit.vision import VisionEncoder


class Engine:
    """`granvit.engine.TrainEngine` over PyTorch, replicated data parallel."""

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], ranks: Ranks | None = None, stage: Stage | None = None):  # fmt: skip
        runtime, stage = config.runtime, stage or config.stage_spec
        self.config, self.vision = config, vision
        self.ranks = ranks or distributed.join(runtime.device)
        self.rank, self.world, self.device = self.ranks.rank, self.ranks.world, self.ranks.device
        self.dtype = DTYPES[runtime.compute]
        self.kernels = kernels_for(self.device, self.dtype, runtime.kernels)
        self.compilations: dict[str, int] = {}  # counted for MindSpore's graphs only
        masters = torch.float64 if self.dtype == torch.float64 else torch.float32
        with torch.device(self.device):
            self.model = GranViT(vision, language, self.dtype, self.kernels, runtime.recompute, stage.zero_image_tokens)
        for name, parameter in self.model.named_parameters():
            trained = part_of(name) in stage.trains
            parameter.requires_grad_(trained)
            parameter.data = torch.empty_like(parameter, dtype=masters if trained else self.dtype)
        fill(self.model, start)
        self.trained = FlatParameters((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        self.optimizer = AdamW(self.trained, config.optimizer, self.kernels)
        self.teacher: VisionEncoder | None = None
        if stage.distill:
            with torch.device(self.device):
                self.teacher = VisionEncoder(vision, self.dtype, config.crop_size(vision), self.kernels)
            self.teacher.requires_grad_(False).to(masters)
            fill(self.teacher, self.model.vision.named_parameters())
        self.grid = config.distill.grid or config.crop_size(vision) // vision.patch_size
        tiled = vision.tiles > 0  # `roi_align_tiled`, which is composed
        self.roi_align = self.kernels.pick("roi_align", grid=self.grid) if stage.distill and not tiled else None
        positions = config.train.micro_batch * max(bucket.answers for bucket in config.data.buckets)
        fused = self.kernels.row("cross_entropy", positions=positions, vocab=language.vocab,
                                 trained=self.model.language.head_weight().requires_grad)  # fmt: skip
        self.cross_entropy = None if fused.name == COMPOSED else self.kernels.load(fused.function)
        self.compute = self._compute
        if runtime.compile:
            # Two graphs for each bucket: with gradients, and without for the held-out loss. By default 8 are an error.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 2 * len(config.data.buckets) + 1)
            self.compute = torch.compile(self._compute, dynamic=False, fullgraph=True)

    memory = staticmethod(distributed.memory)
    join = staticmethod(distributed.join)

    def step(self, micro_batches: Sequence[Batch], step_inputs: StepInputs) -> StepResult:
        """Forward and backward over the micro-batches, sum over ranks, clip, AdamW, EMA.

        The host reads from the device once, before the update. If loss or gradient norm is not finite, no weight is changed, the
        host also reads the micro-batches' losses, and `NonFiniteLoss` lists this rank's micro-batches that are not finite.
        """
        sums = self.trained.values.new_zeros(3)  # caption, distillation, feature variance
        own_losses = []
        for batch in micro_batches:
            loss, *terms = self.losses(batch, step_inputs)
            loss.backward()
            sums += torch.stack(terms).detach()
            own_losses.append(loss.detach())
        distributed.all_sum_(sums)
        distributed.all_sum_(self.trained.gradients)
        grad_norm = self.trained.gradient_norm()
        caption, distill, variance, norm = torch.cat((sums, grad_norm.reshape(1))).tolist()
        loss = caption + self.config.distill.weight * distill
        if not np.isfinite([loss, norm]).all():
            self.trained.gradients.zero_()
            culprits = np.flatnonzero(~np.isfinite(torch.stack(own_losses).tolist())).tolist()
            raise NonFiniteLoss(f"loss {loss}, gradient norm {norm}", culprits)
        self.optimizer.step(step_inputs.step, step_inputs.learning_rate, grad_norm)
        if self.teacher is not None:
            ema_(list(self.teacher.parameters()), list(self.model.vision.parameters()), step_inputs.alpha)
        return StepResult(loss, caption, distill, norm, (variance / max(step_inputs.boxes, 1)) ** 0.5)

    def losses(self, batch: Batch, step_inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`compute` of a batch."""
        # The divisors are tensors, because `torch.compile` compiles again for every new value of a number.
        tokens, boxes = (self._to_device(torch.tensor(n, dtype=self.trained.values.dtype)) for n in step_inputs.divisors(batch))
        inputs = (
            self._put(batch.pixels_B3RR), self._put(batch.image_weights_B), self._ids(batch.token_ids_BS),
            self._ids(batch.positions_BS), self._ids(batch.segments_BS), self._ids(batch.image_positions_BN),
            self._ids(batch.answer_positions_BA),
        )  # fmt: skip
        answers = self._ids(batch.answer_targets_BA), self._put(batch.answer_weights_BA), tokens
        if self.teacher is None:
            return self.compute(inputs, answers, None)
        grids_B2 = None if batch.grids_B2 is None else self._ids(batch.grids_B2)
        boxes_BK4, weights_BK = self._put(batch.boxes_BK4), self._put(batch.box_weights_BK)
        return self.compute(inputs, answers, (self._put(batch.crops_BK3rr), boxes_BK4, weights_BK, grids_B2, boxes))

    def _compute(self, inputs: tuple[Tensor, ...], answers: tuple[Tensor, ...],
                 regions: tuple[Tensor | None, ...] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Loss, caption loss and distillation loss: the batch's sums divided by `StepInputs.divisors`. Then the summed variance
        of the teacher's features, not divided. All arguments are tensors: this is what `runtime.compile` compiles."""
        targets_BA, weights_BA, tokens = answers
        if self.cross_entropy is None:
            logits, built_features = self.model(*inputs)
            caption = caption_sum(logits, targets_BA, weights_BA) / tokens
        else:
            hidden, built_features = self.model.hidden(*inputs)
            head_VC = self.model.language.head_weight()
            caption = self.cross_entropy(hidden.flatten(0, 1), head_VC, targets_BA.flatten(), weights_BA.flatten()) / tokens
        if regions is None:
            return caption, caption, torch.zeros_like(caption), torch.zeros_like(caption)
        crops_BK3rr, boxes_BK4, weights_BK, grids_B2, boxes = regions
        target = teacher_features(self.teacher, crops_BK3rr, self.grid)
        distill, variance = distill_sums(built_features, target, boxes_BK4, weights_BK, self.config.distill.loss, grids_B2,
                                         self.roi_align)  # fmt: skip
        distill = distill / boxes
        return caption + self.config.distill.weight * distill, caption, distill, variance

    @torch.no_grad()
    def loss_sums(self, micro_batches: Iterable[Batch]) -> np.ndarray:
        """Caption loss summed over tokens, distillation loss summed over boxes, `[2]`; the host reads from the device once."""
        sums = self.trained.values.new_zeros(2)
        for batch in micro_batches:
            _, caption, distill, _ = self.losses(batch, UNDIVIDED)
            sums += torch.stack((caption, distill))
        return to_numpy(sums)

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks."""
        return self.ranks.all_sum(values)

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values of one group's tensors; the names are those of the parameters."""
        for name, tensor in self._group(group).items():
            yield name, to_numpy(tensor)

    def load(self, group: Group, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replaces one group's tensors."""
        parameters = self._group(group)
        with torch.no_grad():
            for name, array in tensors:
                parameters[name].copy_(to_tensor(array, parameters[name].dtype))

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> np.ndarray:
        """Greedy continuation, int32 `[B, max_new_tokens]`."""
        return greedy(self.model, prompts, max_new_tokens, stop_token, self.device)

    def close(self) -> None:
        """Leaves the process group."""
        self.ranks.leave()

    def _group(self, group: Group) -> dict[str, Tensor]:
        if group == "model":
            return dict(self.model.named_parameters())
        if group == "teacher":
            return {} if self.teacher is None else {f"teacher.{n}": p for n, p in self.teacher.named_parameters()}
        moment = self.optimizer.first_moment if group == "first_moment" else self.optimizer.second_moment
        return self.trained.views(moment)

    def _put(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(array))

    def _ids(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(array).long())

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device; on CUDA the host does not wait for the copy."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor.to(self.device)
