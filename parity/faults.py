"""Planted faults: typical errors of a port. One at a time is planted in one framework, by replacing a function or method of its
package; the check must answer "diverged" and name the place.

A fault states the suite that must detect it, and the kinds and names that the first diverging tensor may have.
"""
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

Plant = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Fault:
    """`where` lists prefixes of `<kind>/<name>`; the first diverging tensor of `suite` must have one of them."""

    name: str
    framework: str
    suite: str
    where: tuple[str, ...]
    plant: Plant
    vision: str = "tiny-vision"


FAULTS: dict[str, Fault] = {}


def fault(name: str, framework: str, suite: str, *where: str, at: str | None = None, vision: str = "tiny-vision") -> Callable:
    """Registers a fault. With `at`, the dotted path of a function or method, the decorated function gets the original and returns
    the wrong version. Without `at`, it is a generator function that plants the fault, yields, and removes it."""

    def register(make: Callable) -> Callable:
        plant = contextmanager(make) if at is None else lambda: replaced(at, make)
        FAULTS[name] = Fault(name, framework, suite, where, plant, vision)
        return make

    return register


@contextmanager
def planted(name: str | None, framework: str) -> Iterator[None]:
    """Plants a fault inside the block. Does nothing if `name` is None or the fault belongs to the other framework."""
    if name is None or FAULTS[name].framework != framework:
        yield
        return
    with FAULTS[name].plant():
        yield


@contextmanager
def replaced(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block, `target` (a dotted path) is replaced by `make(original)`."""
    path, _, attribute = target.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    with patch.object(owner, attribute, make(getattr(owner, attribute))):
        yield


BLOCK0, DECODER0 = "forward/vision.encoder.layers.0", "forward/language.model.layers.0"


# --- PyTorch: the forward pass ----------------------------------------------------------------------------------------
@fault("GELU exact for tanh", "torch", "vision", f"{BLOCK0}.mlp", at="pt_granvit.vision.activate")
def _(f):
    return lambda kind, x: f("gelu" if kind == "gelu_tanh" else kind, x)


@fault("layer norm epsilon 1e-5", "torch", "vision", f"{BLOCK0}.layer_norm1", at="pt_granvit.layers.LayerNorm.__init__")
def _(init):
    def wrong(self, width, eps):
        init(self, width, 1e-5)

    return wrong


@fault("RMS norm epsilon 1e-5", "torch", "language", f"{DECODER0}.input_layernorm", at="pt_granvit.layers.RMSNorm.__init__")
def _(init):
    def wrong(self, width, eps):
        init(self, width, 1e-5)

    return wrong


@fault("RMS norm without its weight", "torch", "language", f"{DECODER0}.input_layernorm", at="pt_granvit.layers.RMSNorm.forward")
def _(forward):
    import torch

    def wrong(self, x):
        return self.emit(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    return wrong


@fault("queries and keys swapped", "torch", "vision", f"{BLOCK0}.self_attn", at="pt_granvit.ops.attention.attention")
def _(f):
    def wrong(q, k, v, mask, implementation):
        return f(k, q, v, mask, implementation) if mask is None else f(q, k, v, mask, implementation)

    return wrong


@fault("attention without its scale", "torch", "vision", f"{BLOCK0}.self_attn", at="pt_granvit.ops.attention.attention")
def _(f):
    return lambda q, k, v, mask, implementation: f(q * q.shape[-1] ** 0.5, k, v, mask, implementation)


@fault("a bias missing in the MLP", "torch", "vision", f"{BLOCK0}.mlp.fc1", at="pt_granvit.layers.Linear.forward")
def _(forward):
    def wrong(self, x):
        n_out, n_in = self.weight.shape
        return self.emit(x @ self.weight.T.to(x)) if self.bias is not None and n_out == 2 * n_in else forward(self, x)

    return wrong


@fault("mask off by one", "torch", "language", f"{DECODER0}.self_attn", at="pt_granvit.ops.attention.shared_prefix_mask")
def _(f):
    import torch

    def wrong(segments):
        mask = f(segments)
        return mask & ~torch.eye(mask.shape[-1], dtype=torch.bool).roll(-3, 1) | torch.eye(mask.shape[-1], dtype=torch.bool)

    return wrong


@fault("a question sees the others", "torch", "language", f"{DECODER0}.self_attn",
       at="pt_granvit.ops.attention.shared_prefix_mask")  # fmt: skip
def _(f):
    return lambda segments: f(segments * 0)


@fault("positions not restarted", "torch", "language", f"{DECODER0}.self_attn", at="pt_granvit.language.CausalDecoder.forward")
def _(forward):
    import torch

    return lambda self, x, positions, segments: forward(self, x, torch.arange(x.shape[1]).expand_as(positions), segments)


@fault("RoPE with another theta", "torch", "language", f"{DECODER0}.self_attn", at="pt_granvit.language.rotary")
def _(f):
    return lambda p, d, theta, dtype: f(p, d, 5e5, dtype)


@fault("RoPE in interleaved layout", "torch", "language", f"{DECODER0}.self_attn", at="pt_granvit.language.rotate")
def _(f):
    import torch

    def wrong(x, cos, sin):
        half = x.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + turned * sin

    return wrong


@fault("key heads repeated in the wrong order", "torch", "language", f"{DECODER0}.self_attn",
       at="pt_granvit.ops.attention.attention")  # fmt: skip
def _(f):
    def wrong(q, k, v, mask, implementation):
        groups = q.shape[1] // k.shape[1]
        return f(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), mask, implementation)

    return wrong


@fault("tied head of another table", "torch", "language", "forward/language", at="pt_granvit.language.CausalDecoder.head")
def _(head):
    import torch

    return lambda self, h: self.emit(torch.nn.functional.linear(h, self.model.embed_tokens.weight.roll(1, 0).to(h.dtype)))


@fault("features of the layer below", "torch", "model", "forward/projector.linear_1",
       at="pt_granvit.vision.VisionEncoder.encode")  # fmt: skip
def _(forward):
    import torch

    def wrong(self, pixels):
        inputs_of_last = []
        handle = self.encoder.layers[-1].register_forward_pre_hook(lambda _, args: inputs_of_last.append(args[0]))
        features, built_features = forward(self, pixels)
        handle.remove()
        assert isinstance(features, torch.Tensor)
        return inputs_of_last[0], built_features

    return wrong


@fault("class token kept, a patch dropped", "torch", "model", "forward/projector.linear_1", vision="tiny-clip",
       at="pt_granvit.vision.VisionEncoder.encode")  # fmt: skip
def _(forward):
    import torch

    def wrong(self, pixels):
        outputs_of_last = []
        handle = self.encoder.layers[-1].register_forward_hook(lambda _, args, out: outputs_of_last.append(out))
        built_features = forward(self, pixels)[1]
        handle.remove()
        assert isinstance(outputs_of_last[0], torch.Tensor)
        return outputs_of_last[0][:, :-1], built_features

    return wrong


@fault("positions resampled with antialiasing", "torch", "ops", "forward/positions", at="pt_granvit.vision.position_matrix")
def _(f):
    import numpy as np
    import torch
    import torch.nn.functional as F

    def wrong(grid_from, grid_to):
        unit = torch.eye(grid_from**2).reshape(-1, 1, grid_from, grid_from)
        out = F.interpolate(unit, (grid_to, grid_to), mode="bicubic", antialias=True)
        return np.ascontiguousarray(out.reshape(grid_from**2, -1).T.numpy())

    return wrong


@fault("another pixel mean", "torch", "vision", "forward/vision.embeddings.patch_embedding",
       at="pt_granvit.vision.VisionEncoder.normalise")  # fmt: skip
def _(f):
    return lambda self, pixels: f(self, pixels) + 0.02


@fault("ROIAlign without the half pixel", "torch", "ops", "forward/roi_align", at="pt_granvit.ops.roi_align.sampling_matrix")
def _(f):
    return lambda low, high, grid, cells: f(low + 0.5 / cells, high + 0.5 / cells, grid, cells)


@fault("ROIAlign with x and y swapped", "torch", "ops", "forward/roi_align", at="pt_granvit.ops.roi_align.roi_align")
def _(f):
    return lambda x, boxes, grid: f(x, boxes[..., [1, 0, 3, 2]], grid)


@fault("boxes in another frame", "torch", "model", "loss/loss_distill", at="pt_granvit.engine.distill_sums")
def _(f):
    return lambda student, teacher, boxes, weights, loss: f(student, teacher, boxes * 0.9, weights, loss)


@fault("crops off by a pixel", "torch", "model", "forward/teacher.embeddings.patch_embedding",
       at="pt_granvit.engine.teacher_features")  # fmt: skip
def _(f):
    return lambda teacher, crops, grid: f(teacher, crops.roll(1, -1), grid)


# --- PyTorch: the loss and the gradients ------------------------------------------------------------------------------
@fault("mean over a micro-batch for a sum over the batch", "torch", "stage1", "loss/loss_caption",
       at="pt_granvit.engine.caption_sum")  # fmt: skip
def _(f):
    return lambda logits, targets, weights: f(logits, targets, weights) / weights.sum() * 3


@fault("lambda left out", "torch", "model", "loss/loss", at="pt_granvit.engine.Engine.losses")
def _(f):
    def wrong(self, batch, step_inputs):
        _, caption, distill, variance = f(self, batch, step_inputs)
        return caption + distill, caption, distill, variance

    return wrong


@fault("gradient through the teacher's features", "torch", "model", "backward/vision", "gradient/vision",
       at="pt_granvit.engine.distill_sums")  # fmt: skip
def _(f):
    def wrong(student, teacher, boxes, weights, loss):
        leak = student.mean(1)[:, None, None, None, :]
        return f(student, teacher + leak - leak.detach(), boxes, weights, loss)

    return wrong


@fault("the last micro-batch's gradient alone", "torch", "stage1", "loss/grad_norm", "clipped gradient/",
       at="pt_granvit.engine.Engine.losses")  # fmt: skip
def _(f):
    def wrong(self, batch, step_inputs):
        self.trained.gradients.zero_()
        return f(self, batch, step_inputs)

    return wrong


# --- PyTorch: the optimizer and the teacher ---------------------------------------------------------------------------
@fault("EMA with another alpha", "torch", "stage1", "teacher/", at="pt_granvit.engine.ema_")
def _(f):
    return lambda teacher, student, alpha: f(teacher, student, 0.99)


@fault("EMA once for each micro-batch", "torch", "stage1", "teacher/", at="pt_granvit.engine.ema_")
def _(f):
    def wrong(teacher, student, alpha):
        f(teacher, student, alpha)
        f(teacher, student, alpha)

    return wrong


@fault("EMA before the step", "torch", "stage1", "teacher/")
def _():
    before = {}

    def keep(step):
        def wrong(self, *arguments):
            before["weights"] = [p.detach().clone() for n, p in self.parameters.named]
            before["live"] = [p for n, p in self.parameters.named]
            step(self, *arguments)

        return wrong

    def late(ema):
        def wrong(teacher, student, alpha):
            of = {id(p): old for p, old in zip(before["live"], before["weights"], strict=True)}
            ema(teacher, [of[id(p)] for p in student], alpha)

        return wrong

    with replaced("pt_granvit.optimizer.AdamW.step", keep), replaced("pt_granvit.engine.ema_", late):
        yield


@fault("AdamW without bias correction", "torch", "stage1", "weight/", at="pt_granvit.optimizer.AdamW.step")
def _(f):
    return lambda self, step, rate, norm: f(self, 10**6, rate, norm)


@fault("weight decay on norms and biases", "torch", "stage1", "weight/vision.embeddings.patch_embedding.bias", "weight/vision",
       at="pt_granvit.optimizer.FlatParameters.__init__")  # fmt: skip
def _(init):
    def wrong(self, named):
        init(self, named)
        self.decayed = len(self.values)

    return wrong


@fault("AdamW's epsilon inside the root", "torch", "stage1", "weight/", at="pt_granvit.optimizer.AdamW.step")
def _(step):
    def wrong(self, t, rate, norm):
        before, c = self.parameters.values.clone(), self.config
        step(self, t, rate, norm)
        correction1, correction2 = 1 - c.betas[0] ** t, 1 - c.betas[1] ** t
        p = self.parameters
        p.values.copy_(before)
        p.values[: p.decayed].mul_(1 - rate * c.weight_decay)
        p.values.sub_(rate / correction1 * self.first_moment / (self.second_moment / correction2 + c.eps).sqrt())

    return wrong


@fault("learning rate one step late", "torch", "stage1", "weight/", at="pt_granvit.optimizer.AdamW.step")
def _(step):
    rates = [0.0]

    def wrong(self, t, rate, norm):
        rates.append(rate)
        step(self, t, rates[-2], norm)

    return wrong


@fault("clipped before the all-reduce", "torch", "trajectory2", "curve/grad_norm", at="pt_granvit.distributed.all_sum_")
def _(f):
    def wrong(tensor):
        norm = tensor.norm()
        if tensor.numel() > 100:  # the gradients, not the counts
            tensor.mul_((0.5 / norm).clamp(max=1.0))
        f(tensor)

    return wrong


@fault("a frozen encoder that trains", "torch", "stage2", "clipped gradient/vision", "first moment/vision", "loss/grad_norm")
def _():
    from dataclasses import replace

    import granvit.config

    stages = granvit.config.STAGES
    wrong = {**stages, "stage2": replace(stages["stage2"], trains=stages["stage2"].trains | {"vision"})}
    with patch.object(granvit.config, "STAGES", wrong):
        yield


@fault("a square weight transposed in conversion", "torch", "vision", f"{BLOCK0}.self_attn.k_proj",
       at="pt_granvit.engine.fill")  # fmt: skip
def _(f):
    def wrong(module, tensors):
        f(module, ((n, v.T.copy() if n.endswith("layers.0.self_attn.k_proj.weight") and "vision" in n else v)
                   for n, v in tensors))  # fmt: skip

    return wrong


# --- PyTorch: faults in code that only an option runs -----------------------------------------------------------------
@fault("a cell for the mean of its neighbours", "torch", "option pooled", "loss/loss_distill",
       at="pt_granvit.engine.teacher_features")  # fmt: skip
def _(f):
    def wrong(teacher, crops, grid):
        own = f(teacher, crops, 2 * grid)
        return own[:, :, ::2, ::2]

    return wrong


@fault("cosine of features without their mean", "torch", "option pooled", "loss/loss_distill",
       at="pt_granvit.engine.distill_sums")  # fmt: skip
def _(f):
    def wrong(student, teacher, *rest):
        return f(student, teacher - teacher.mean(-1, keepdim=True), *rest)

    return wrong


@fault("the teacher's positions not resampled but cut", "torch", "option resampled", "forward/teacher.embeddings",
       at="pt_granvit.vision.position_matrix")  # fmt: skip
def _(f):
    import numpy as np

    def wrong(grid_from, grid_to):
        selected = [row * grid_from + column for row in range(grid_to) for column in range(grid_to)]
        return np.eye(grid_from**2, dtype=np.float32)[selected]

    return wrong


@fault("tiles in columns for tiles in rows", "torch", "option tiled", "loss/loss_distill",
       at="pt_granvit.ops.roi_align.roi_align_tiled")  # fmt: skip
def _(f):
    return lambda tiles, grids, boxes, grid: f(tiles, grids.flip(-1), boxes, grid)


@fault("a layer scale of ones", "torch", "option tuned", BLOCK0, at="pt_granvit.engine.fill")
def _(f):
    def wrong(module, tensors):
        f(module, ((n, v * 0 + 1 if "layer_scale2" in n else v) for n, v in tensors))

    return wrong


@fault("an untied head of the embeddings' table", "torch", "option pooled", "forward/language.lm_head",
       at="pt_granvit.engine.fill")  # fmt: skip
def _(f):
    def wrong(module, tensors):
        table = dict(tensors)
        if "language.lm_head.weight" in table:
            table["language.lm_head.weight"] = table["language.model.embed_tokens.weight"]
        f(module, table.items())

    return wrong


# --- MindSpore: replaced before compilation, so the fault is in the static graph --------------------------------------
@fault("four neighbours in columns, in MindSpore", "mindspore", "option tiled", "forward/projector.linear_1",
       at="ms_granvit.projector.pixel_shuffle")  # fmt: skip
def _(f):
    from mindspore import ops

    def wrong(features):
        B, N, C = features.shape
        half = int(N**0.5 + 0.5) // 2
        cells = ops.transpose(features.reshape(B, half, 2, half, 2, C), (0, 1, 3, 4, 2, 5))
        return cells.reshape(B, half * half, 4 * C)

    return wrong


@fault("squares for the cosine, in MindSpore", "mindspore", "option pooled", "loss/loss_distill",
       at="ms_granvit.engine.distill_sums")  # fmt: skip
def _(f):
    def wrong(student, teacher, boxes, weights, loss, grids):
        return f(student, teacher, boxes, weights, "mse", grids)

    return wrong


@fault("GELU exact for tanh, in MindSpore", "mindspore", "vision", f"{BLOCK0}.mlp", at="ms_granvit.vision.activate")
def _(f):
    from mindspore import ops

    def wrong(kind, x):
        return ops.gelu(x)

    return wrong


@fault("layer norm epsilon 1e-5, in MindSpore", "mindspore", "vision", f"{BLOCK0}.layer_norm1",
       at="ms_granvit.layers.LayerNorm.__init__")  # fmt: skip
def _(init):
    def wrong(self, width, eps):
        init(self, width, 1e-5)

    return wrong


@fault("a question sees the others, in MindSpore", "mindspore", "language", f"{DECODER0}.self_attn",
       at="ms_granvit.ops.attention.shared_prefix_mask")  # fmt: skip
def _(f):
    from mindspore import ops

    def wrong(segments):
        order = ops.arange(segments.shape[1])
        causal = ops.expand_dims(order, 0) <= ops.expand_dims(order, 1)
        return ops.broadcast_to(ops.expand_dims(ops.expand_dims(causal, 0), 0), (segments.shape[0], 1, *causal.shape))

    return wrong


@fault("RoPE with another theta, in MindSpore", "mindspore", "language", f"{DECODER0}.self_attn",
       at="ms_granvit.language.Rotary.__init__")  # fmt: skip
def _(init):
    def wrong(self, head_dim, theta, dtype):
        init(self, head_dim, 5e5, dtype)

    return wrong


@fault("RoPE with the sign of its sine turned, in MindSpore", "mindspore", "language", f"{DECODER0}.self_attn",
       at="ms_granvit.language.rotate")  # fmt: skip
def _(f):
    from mindspore import ops

    def wrong(x, cos, sin):
        half = x.shape[-1] // 2
        turned = ops.cat((x[..., half:], -x[..., :half]), -1)
        return x * cos + turned * sin

    return wrong


@fault("attention without its scale, in MindSpore", "mindspore", "vision", f"{BLOCK0}.self_attn",
       at="ms_granvit.ops.attention.composed")  # fmt: skip
def _(f):
    def wrong(q, k, v, mask):
        return f(q * q.shape[-1] ** 0.5, k, v, mask)

    return wrong


@fault("ROIAlign without the half pixel, in MindSpore", "mindspore", "ops", "forward/roi_align",
       at="ms_granvit.ops.roi_align.sampling_matrix")  # fmt: skip
def _(f):
    def wrong(low, high, grid, cells):
        return f(low + 0.5 / cells, high + 0.5 / cells, grid, cells)

    return wrong


@fault("tied head of another table, in MindSpore", "mindspore", "language", "forward/language",
       at="ms_granvit.language.CausalDecoder.head")  # fmt: skip
def _(head):
    from mindspore import ops

    from ms_granvit.layers import linear

    def wrong(self, hidden):
        table = self.model.embed_tokens.weight
        return self.emit(linear(hidden, ops.cat((table[1:], table[:1])), None))

    return wrong


@fault("another pixel mean, in MindSpore", "mindspore", "vision", "forward/vision.embeddings.patch_embedding",
       at="ms_granvit.vision.VisionEncoder.__init__")  # fmt: skip
def _(init):
    def wrong(self, *arguments, **options):
        init(self, *arguments, **options)
        self.mean = self.mean - 0.01

    return wrong


@fault("the caption loss doubled, in MindSpore", "mindspore", "model", "loss/loss_caption", at="ms_granvit.engine.caption_sum")
def _(f):
    def wrong(logits, targets, weights):
        return f(logits, targets, weights) * 2

    return wrong


@fault("weight decay on norms and biases, in MindSpore", "mindspore", "stage1", "weight/vision",
       at="ms_granvit.optimizer.AdamW.__init__")  # fmt: skip
def _(init):
    def wrong(self, parameters, gradients, config):
        init(self, parameters, gradients, config)
        self.decayed = tuple(True for _ in parameters)

    return wrong


@fault("EMA of the moments' rate, in MindSpore", "mindspore", "stage1", "teacher/", at="ms_granvit.distill.EMA.construct")
def _(construct):
    def wrong(self, alpha, one_minus_alpha):
        return construct(self, alpha + one_minus_alpha * 0.5, one_minus_alpha * 0.5)

    return wrong
