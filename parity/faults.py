"""Planted faults: typical errors of a port. One at a time is planted in one framework, by replacing a function or method of its
package; the check must answer "diverged" and name the place.

Operators are `composed` in these trials, but for those that `--kernels` names; a fault inside an operator's composed
implementation keeps that operator composed, so that it is reached. A fault states the suite that must detect it, and the kinds
and names that the first diverging tensor may have.
"""
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from granvit.kernels import Operator

FRAMEWORKS = {"pt_granvit": "torch", "ms_granvit": "mindspore"}


@dataclass(frozen=True)
class Fault:
    """`where` lists prefixes of `<kind>/<name>`; the first diverging tensor of `suite` must have one of them. `operator` is the
    operator whose composed implementation has the fault, if one has."""

    name: str
    framework: str
    suite: str
    where: tuple[str, ...]
    plant: Callable[[], AbstractContextManager]
    vision: str
    operator: Operator | None


FAULTS: dict[str, Fault] = {}


def fault(name: str, target: str, suite: str, *where: str, vision: str = "tiny-vision",
          operator: Operator | None = None) -> Callable:  # fmt: skip
    """Registers a fault. `target` is the dotted path of a function or method. The decorated function replaces it, and gets the
    original before the arguments. If `target` is only a package, the decorated function is a generator function that plants the
    fault, yields, and removes it."""
    package, _, inside = target.partition(".")

    def register(wrong: Callable) -> Callable:
        plant = (lambda: replaced(target, wrong)) if inside else contextmanager(wrong)
        FAULTS[name] = Fault(name, FRAMEWORKS[package], suite, where, plant, vision, operator)
        return wrong

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
def replaced(target: str, wrong: Callable) -> Iterator[None]:
    """Inside the block, a call of `target` (a dotted path) is a call of `wrong` with the original before the arguments."""
    original = pkgutil.resolve_name(target)

    def replacement(*arguments, **options):
        return wrong(original, *arguments, **options)

    with patch(target, replacement):
        yield


BLOCK0, DECODER0 = "forward/vision.encoder.layers.0", "forward/language.model.layers.0"


# --- PyTorch: the forward pass ----------------------------------------------------------------------------------------
@fault("GELU exact for tanh", "pt_granvit.ops.activations.gelu", "vision", f"{BLOCK0}.mlp", operator="gelu")
def _(f, x):
    from pt_granvit.ops.activations import exact_gelu

    return exact_gelu(x)


@fault("layer norm epsilon 1e-5", "pt_granvit.layers.LayerNorm.__init__", "vision", f"{BLOCK0}.layer_norm1")
def _(init, self, width, eps, kernels):
    init(self, width, 1e-5, kernels)


@fault("RMS norm epsilon 1e-5", "pt_granvit.layers.RMSNorm.__init__", "language", f"{DECODER0}.input_layernorm")
def _(init, self, width, eps, kernels):
    init(self, width, 1e-5, kernels)


@fault("RMS norm without its weight", "pt_granvit.ops.rms_norm.composed", "language", f"{DECODER0}.input_layernorm",
       operator="rms_norm")  # fmt: skip
def _(f, x, weight, eps):
    return f(x, weight * 0 + 1, eps)


@fault("queries and keys swapped", "pt_granvit.ops.attention.composed", "vision", f"{BLOCK0}.self_attn", operator="attention")
def _(f, q, k, v, mask):
    return f(k, q, v, mask) if mask is None else f(q, k, v, mask)


@fault("attention without its scale", "pt_granvit.ops.attention.composed", "vision", f"{BLOCK0}.self_attn", operator="attention")
def _(f, q, k, v, mask):
    return f(q * q.shape[-1] ** 0.5, k, v, mask)


@fault("a bias missing in the MLP", "pt_granvit.layers.Linear.forward", "vision", f"{BLOCK0}.mlp.fc1")
def _(forward, self, x):
    n_out, n_in = self.weight.shape
    return self.emit(x @ self.weight.T.to(x)) if self.bias is not None and n_out == 2 * n_in else forward(self, x)


@fault("mask off by one", "pt_granvit.ops.attention.shared_prefix_mask", "language", f"{DECODER0}.self_attn",
       operator="attention")  # fmt: skip
def _(f, segments):
    import torch

    mask = f(segments)
    return mask & ~torch.eye(mask.shape[-1], dtype=torch.bool).roll(-3, 1) | torch.eye(mask.shape[-1], dtype=torch.bool)


@fault("a question sees the others", "pt_granvit.ops.attention.shared_prefix_mask", "language",
       f"{DECODER0}.self_attn", operator="attention")  # fmt: skip
def _(f, segments):
    return f(segments * 0)


@fault("positions not restarted", "pt_granvit.language.CausalDecoder.forward", "language", f"{DECODER0}.self_attn")
def _(forward, self, x, positions, segments):
    import torch

    return forward(self, x, torch.arange(x.shape[1]).expand_as(positions), segments)


@fault("RoPE with another theta", "pt_granvit.language.rotary", "language", f"{DECODER0}.self_attn")
def _(f, positions, head_dim, theta, dtype):
    return f(positions, head_dim, 5e5, dtype)


@fault("RoPE in interleaved layout", "pt_granvit.ops.rope.composed", "language", f"{DECODER0}.self_attn", operator="rope")
def _(f, x, cos, sin):
    import torch

    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


@fault("key heads repeated in the wrong order", "pt_granvit.ops.attention.repeated", "language",
       f"{DECODER0}.self_attn", operator="attention")  # fmt: skip
def _(f, heads, H):
    return heads.repeat(1, H // heads.shape[1], 1, 1)


@fault("the fused attention's mask inverted", "pt_granvit.ops.attention.npu_fusion", "ops", "forward/attention, shared prefix")
def _(f, q, k, v, mask):
    return f(q, k, v, mask if mask is None else ~mask)


@fault("tied head of another table", "pt_granvit.language.CausalDecoder.head", "language", "forward/language")
def _(head, self, h):
    import torch

    return self.emit(torch.nn.functional.linear(h, self.model.embed_tokens.weight.roll(1, 0).to(h.dtype)))


@fault("features of the layer below", "pt_granvit.vision.VisionEncoder.encode", "model", "forward/projector.linear_1")
def _(encode, self, pixels):
    inputs_of_last = []
    handle = self.encoder.layers[-1].register_forward_pre_hook(lambda _, args: inputs_of_last.append(args[0]))
    built_features = encode(self, pixels)[1]
    handle.remove()
    return inputs_of_last[0], built_features


@fault("class token kept, a patch dropped", "pt_granvit.vision.VisionEncoder.encode", "model", "forward/projector.linear_1",
       vision="tiny-clip")  # fmt: skip
def _(encode, self, pixels):
    outputs_of_last = []
    handle = self.encoder.layers[-1].register_forward_hook(lambda _, args, out: outputs_of_last.append(out))
    built_features = encode(self, pixels)[1]
    handle.remove()
    return outputs_of_last[0][:, :-1], built_features


@fault("positions resampled with antialiasing", "pt_granvit.vision.position_matrix", "ops", "forward/positions")
def _(f, grid_from, grid_to):
    import numpy as np
    import torch
    import torch.nn.functional as F

    unit = torch.eye(grid_from**2).reshape(-1, 1, grid_from, grid_from)
    out = F.interpolate(unit, (grid_to, grid_to), mode="bicubic", antialias=True)
    return np.ascontiguousarray(out.reshape(grid_from**2, -1).T.numpy())


@fault("another pixel mean", "pt_granvit.vision.VisionEncoder.normalise", "vision",
       "forward/vision.embeddings.patch_embedding")  # fmt: skip
def _(f, self, pixels):
    return f(self, pixels) + 0.02


@fault("ROIAlign without the half pixel", "pt_granvit.ops.roi_align.sampling_matrix", "ops", "forward/roi_align",
       operator="roi_align")  # fmt: skip
def _(f, low, high, grid, cells):
    return f(low + 0.5 / cells, high + 0.5 / cells, grid, cells)


@fault("ROIAlign with x and y swapped", "pt_granvit.ops.roi_align.roi_align", "ops", "forward/roi_align", operator="roi_align")
def _(f, x, boxes, grid):
    return f(x, boxes[..., [1, 0, 3, 2]], grid)


@fault("boxes in another frame", "pt_granvit.engine.distill_sums", "model", "loss/loss_distill")
def _(f, student, teacher, boxes, *rest):
    return f(student, teacher, boxes * 0.9, *rest)


@fault("crops off by a pixel", "pt_granvit.engine.teacher_features", "model", "forward/teacher.embeddings.patch_embedding")
def _(f, teacher, crops, grid):
    return f(teacher, crops.roll(1, -1), grid)


# --- PyTorch: the loss and the gradients ------------------------------------------------------------------------------
@fault("mean over a micro-batch for a sum over the batch", "pt_granvit.engine.caption_sum", "stage1", "loss/loss_caption")
def _(f, logits, targets, weights):
    return f(logits, targets, weights) / weights.sum() * 3


@fault("lambda left out", "pt_granvit.engine.Engine.losses", "model", "loss/loss")
def _(f, self, batch, step_inputs):
    _, caption, distill, variance = f(self, batch, step_inputs)
    return caption + distill, caption, distill, variance


@fault("gradient through the teacher's features", "pt_granvit.engine.distill_sums", "model", "backward/vision", "gradient/vision")
def _(f, student, teacher, *rest):
    leak = student.mean(1)[:, None, None, None, :]
    return f(student, teacher + leak - leak.detach(), *rest)


@fault("the last micro-batch's gradient alone", "pt_granvit.engine.Engine.losses", "stage1", "loss/grad_norm",
       "clipped gradient/")  # fmt: skip
def _(f, self, batch, step_inputs):
    self.trained.gradients.zero_()
    return f(self, batch, step_inputs)


# --- PyTorch: the optimizer and the teacher ---------------------------------------------------------------------------
@fault("EMA with another alpha", "pt_granvit.engine.ema_", "stage1", "teacher/")
def _(f, teacher, student, alpha):
    f(teacher, student, 0.99)


@fault("EMA once for each micro-batch", "pt_granvit.engine.ema_", "stage1", "teacher/")
def _(f, teacher, student, alpha):
    f(teacher, student, alpha)
    f(teacher, student, alpha)


@fault("EMA before the step", "pt_granvit", "stage1", "teacher/")
def _():
    before = {}  # id of a parameter -> its values before the step

    def keep(step, self, *arguments):
        before.update((id(p), p.detach().clone()) for _, p in self.parameters.named)
        step(self, *arguments)

    def late(ema, teacher, student, alpha):
        ema(teacher, [before[id(p)] for p in student], alpha)

    with replaced("pt_granvit.optimizer.AdamW.step", keep), replaced("pt_granvit.engine.ema_", late):
        yield


@fault("AdamW without bias correction", "pt_granvit.optimizer.AdamW.step", "stage1", "weight/")
def _(f, self, step, rate, norm):
    f(self, 10**6, rate, norm)


@fault("weight decay on norms and biases", "pt_granvit.optimizer.FlatParameters.__init__", "stage1",
       "weight/vision.embeddings.patch_embedding.bias", "weight/vision")  # fmt: skip
def _(init, self, named):
    init(self, named)
    self.decayed = len(self.values)


@fault("AdamW's epsilon inside the root", "pt_granvit.optimizer.AdamW.step", "stage1", "weight/")
def _(step, self, t, rate, norm):
    before, c = self.parameters.values.clone(), self.config
    step(self, t, rate, norm)
    correction1, correction2 = 1 - c.betas[0] ** t, 1 - c.betas[1] ** t
    p = self.parameters
    p.values.copy_(before)
    p.values[: p.decayed].mul_(1 - rate * c.weight_decay)
    p.values.sub_(rate / correction1 * self.first_moment / (self.second_moment / correction2 + c.eps).sqrt())


@fault("learning rate one step late", "pt_granvit", "stage1", "weight/")
def _():
    rates = [0.0]

    def wrong(step, self, t, rate, norm):
        rates.append(rate)
        step(self, t, rates[-2], norm)

    with replaced("pt_granvit.optimizer.AdamW.step", wrong):
        yield


@fault("clipped before the all-reduce", "pt_granvit.distributed.all_sum_", "trajectory2", "curve/grad_norm")
def _(f, tensor):
    norm = tensor.norm()
    if tensor.numel() > 100:  # the gradients, not the counts
        tensor.mul_((0.5 / norm).clamp(max=1.0))
    f(tensor)


@fault("a frozen encoder that trains", "pt_granvit", "stage2", "clipped gradient/vision", "first moment/vision", "loss/grad_norm")
def _():
    from dataclasses import replace

    from granvit.config import STAGES

    stage = STAGES["stage2"]
    with patch("granvit.config.STAGES", {**STAGES, "stage2": replace(stage, trains=stage.trains | {"vision"})}):
        yield


@fault("a square weight transposed in conversion", "pt_granvit.engine.fill", "vision", f"{BLOCK0}.self_attn.k_proj")
def _(f, module, tensors):
    wrong = lambda name: name.endswith("layers.0.self_attn.k_proj.weight") and "vision" in name  # noqa: E731
    f(module, ((n, v.T.copy() if wrong(n) else v) for n, v in tensors))


# --- PyTorch: faults in code that only an option runs -----------------------------------------------------------------
@fault("a cell for the mean of its neighbours", "pt_granvit.engine.teacher_features", "option pooled", "loss/loss_distill")
def _(f, teacher, crops, grid):
    own = f(teacher, crops, 2 * grid)
    return own[:, :, ::2, ::2]


@fault("cosine of features without their mean", "pt_granvit.engine.distill_sums", "option pooled", "loss/loss_distill")
def _(f, student, teacher, *rest):
    return f(student, teacher - teacher.mean(-1, keepdim=True), *rest)


@fault("the teacher's positions not resampled but cut", "pt_granvit.vision.position_matrix", "option resampled",
       "forward/teacher.embeddings")  # fmt: skip
def _(f, grid_from, grid_to):
    import numpy as np

    selected = [row * grid_from + column for row in range(grid_to) for column in range(grid_to)]
    return np.eye(grid_from**2, dtype=np.float32)[selected]


@fault("tiles in columns for tiles in rows", "pt_granvit.ops.roi_align.roi_align_tiled", "option tiled", "loss/loss_distill")
def _(f, tiles, grids, boxes, grid):
    return f(tiles, grids.flip(-1), boxes, grid)


@fault("a layer scale of ones", "pt_granvit.engine.fill", "option tuned", BLOCK0)
def _(f, module, tensors):
    f(module, ((n, v * 0 + 1 if "layer_scale2" in n else v) for n, v in tensors))


@fault("an untied head of the embeddings' table", "pt_granvit.engine.fill", "option pooled", "forward/language.lm_head")
def _(f, module, tensors):
    table = dict(tensors)
    if "language.lm_head.weight" in table:
        table["language.lm_head.weight"] = table["language.model.embed_tokens.weight"]
    f(module, table.items())


# --- MindSpore: replaced before compilation, so the fault is in the static graph --------------------------------------
# A method that is compiled must have `self` as its first argument; faults in such methods do without `replaced`.
@fault("four neighbours in columns, in MindSpore", "ms_granvit.projector.pixel_shuffle", "option tiled",
       "forward/projector.linear_1")  # fmt: skip
def _(f, features):
    B, N, C = features.shape
    half = int(N**0.5 + 0.5) // 2
    cells = features.reshape(B, half, 2, half, 2, C).transpose(0, 1, 3, 4, 2, 5)
    return cells.reshape(B, half * half, 4 * C)


@fault("squares for the cosine, in MindSpore", "ms_granvit.engine.distill_sums", "option pooled", "loss/loss_distill")
def _(f, student, teacher, boxes, weights, loss, *rest):
    return f(student, teacher, boxes, weights, "mse", *rest)


@fault("GELU exact for tanh, in MindSpore", "ms_granvit", "vision", f"{BLOCK0}.mlp", operator="gelu")
def _():
    from ms_granvit.ops.activations import exact_gelu

    with patch("ms_granvit.ops.activations.gelu", exact_gelu):
        yield


@fault("layer norm epsilon 1e-5, in MindSpore", "ms_granvit.layers.LayerNorm.__init__", "vision", f"{BLOCK0}.layer_norm1")
def _(init, self, width, eps, kernels):
    init(self, width, 1e-5, kernels)


@fault("a question sees the others, in MindSpore", "ms_granvit.ops.attention.shared_prefix_mask", "language",
       f"{DECODER0}.self_attn", operator="attention")  # fmt: skip
def _(f, segments):
    return f(segments * 0)


@fault("RoPE with another theta, in MindSpore", "ms_granvit.language.Rotary.__init__", "language", f"{DECODER0}.self_attn")
def _(init, self, head_dim, theta, dtype):
    init(self, head_dim, 5e5, dtype)


@fault("RoPE with the sign of its sine turned, in MindSpore", "ms_granvit.ops.rope.composed", "language",
       f"{DECODER0}.self_attn", operator="rope")  # fmt: skip
def _(f, x, cos, sin):
    return f(x, cos, -sin)


@fault("attention without its scale, in MindSpore", "ms_granvit.ops.attention.composed", "vision",
       f"{BLOCK0}.self_attn", operator="attention")  # fmt: skip
def _(f, q, k, v, mask):
    return f(q * q.shape[-1] ** 0.5, k, v, mask)


@fault("ROIAlign without the half pixel, in MindSpore", "ms_granvit.ops.roi_align.sampling_matrix", "ops",
       "forward/roi_align", operator="roi_align")  # fmt: skip
def _(f, low, high, grid, cells):
    return f(low + 0.5 / cells, high + 0.5 / cells, grid, cells)


@fault("the fused attention's mask inverted, in MindSpore", "ms_granvit.ops.attention.flash", "ops",
       "forward/attention, shared prefix")  # fmt: skip
def _(f, q, k, v, mask):
    return f(q, k, v, mask if mask is None else ~mask)


@fault("tied head of another table, in MindSpore", "ms_granvit", "language", "forward/language")
def _():
    from mindspore import ops

    from ms_granvit.layers import linear

    def wrong(self, hidden):
        table = self.model.embed_tokens.weight
        return self.emit(linear(hidden, ops.cat((table[1:], table[:1])), None))

    with patch("ms_granvit.language.CausalDecoder.head", wrong):
        yield


@fault("another pixel mean, in MindSpore", "ms_granvit.vision.VisionEncoder.__init__", "vision",
       "forward/vision.embeddings.patch_embedding")  # fmt: skip
def _(init, self, *arguments, **options):
    init(self, *arguments, **options)
    self.mean = self.mean - 0.01


@fault("the caption loss doubled, in MindSpore", "ms_granvit.engine.caption_sum", "model", "loss/loss_caption")
def _(f, logits, targets, weights):
    return f(logits, targets, weights) * 2


@fault("weight decay on norms and biases, in MindSpore", "ms_granvit.optimizer.AdamW.__init__", "stage1", "weight/vision")
def _(init, self, parameters, gradients, config, kernels):
    init(self, parameters, gradients, config, kernels)
    self.decayed = tuple(True for _ in parameters)


@fault("EMA of the moments' rate, in MindSpore", "ms_granvit", "stage1", "teacher/")
def _():
    from ms_granvit.distill import EMA

    construct = EMA.construct

    def wrong(self, alpha, one_minus_alpha):
        return construct(self, alpha + one_minus_alpha * 0.5, one_minus_alpha * 0.5)

    with patch.object(EMA, "construct", wrong):
        yield
