"""The second part of the benchmark `memory` of scripts/bench.py: peak memory, measured on this CPU, of what has an implementation
that needs less of it. Linux only.

Each figure is from a process of its own: the rise of resident memory over what it was before the call. Weights and inputs are
there before. The gradients of a layer's weights and input are subtracted; those of the cross-entropy, whose peak comes before
they are whole, are not. A call at a small size comes first, so that libraries are loaded.
"""
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from bench_kernels import SIDES, Shape, make_call
from bench_process import Peak, alone
from rich.console import Console
from rich.table import Table

from granvit.config import language_config
from granvit.models import LanguageConfig

LENGTH, PREFIX, QUESTIONS = 1408, 1044, 4  # tokens of a row: all, an image and the text around it; the rest is equal questions
ANSWERS = 320  # supervised tokens
SMALL = 16  # tokens or answers of the call that comes first
QWEN = "qwen2.5-1.5b"


def one_layer(c: LanguageConfig) -> LanguageConfig:
    return c.model_copy(update={"layers": 1, "vocab": 8, "tied_head": True})


def row(length: int, c: LanguageConfig) -> list[np.ndarray]:
    """Input of a block, positions and segments of one row."""
    rng, prefix = np.random.default_rng(0), length * PREFIX // LENGTH
    questions = 1 + np.arange(length - prefix) * QUESTIONS // (length - prefix)
    segments = np.concatenate([np.zeros(prefix), questions]).astype(np.int32)[None]
    return [rng.standard_normal((1, length, c.width), np.float32), np.arange(length, dtype=np.int32)[None], segments]


def torch_layer(attention: str) -> tuple[Callable[..., list], int]:
    """Forward and backward pass of a decoder layer, and the bytes of the gradients of its weights."""
    import torch

    from pt_granvit.language import CausalDecoder, rotary
    from pt_granvit.ops.table import kernels_for

    c = one_layer(language_config(QWEN))
    decoder = CausalDecoder(c, torch.float32, kernels_for("cpu", torch.float32, {"attention": attention}))
    block = decoder.model.layers[0]
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)

    def both(x: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> list:
        x_BSC = torch.from_numpy(x).requires_grad_()
        cos, sin = rotary(torch.from_numpy(positions), c.head_dim, c.rope_theta, torch.float32)
        out = block(x_BSC, cos, sin, decoder.mask(torch.from_numpy(segments).long()))
        return list(torch.autograd.grad(out.sum(), [x_BSC, *block.parameters()]))

    return both, 4 * sum(weight.numel() for weight in block.parameters())


def mindspore_layer(attention: str) -> tuple[Callable[..., list], int]:
    """See `torch_layer`."""
    import mindspore as ms
    from mindspore import nn

    ms.set_context(mode=ms.GRAPH_MODE)
    from ms_granvit.language import CausalDecoder
    from ms_granvit.ops.table import kernels_for

    class Layer(nn.Cell):
        def __init__(self, decoder):
            super().__init__()
            self.rotary, self.mask, self.block = decoder.rotary, decoder.mask, decoder.model.layers[0]

        def construct(self, x, positions, segments):
            return self.block(x, *self.rotary(positions), self.mask(segments)).sum()

    kernels = kernels_for("cpu", ms.float32, {"attention": attention})
    decoder = CausalDecoder(one_layer(language_config(QWEN)), ms.float32, kernels)
    layer, rng = Layer(decoder), np.random.default_rng(0)
    weights = ms.ParameterTuple(layer.trainable_params())
    for weight in weights:
        weight.set_data(ms.Tensor(0.02 * rng.standard_normal(weight.shape, np.float32)))
    differentiate = ms.value_and_grad(layer, 0, weights)

    def both(*arrays: np.ndarray) -> list:
        loss, gradients = differentiate(*map(ms.Tensor, arrays))
        loss.asnumpy()  # results are asynchronous
        return [gradients]

    return both, 4 * sum(weight.size for weight in weights)


LAYERS = {"torch": torch_layer, "mindspore": mindspore_layer}


def layer_peak(framework: str, attention: str) -> int:
    """Bytes that a decoder layer needs beside weights and gradients."""
    c = language_config(QWEN)
    both, of_gradients = LAYERS[framework](attention)
    both(*row(SMALL, c))
    arrays = row(LENGTH, c)
    with Peak() as peak:
        results = both(*arrays)
    assert results
    return peak.bytes - of_gradients - arrays[0].nbytes


def loss_peak(framework: str, name: str, trained: bool) -> int:
    """Bytes that the cross-entropy needs beside hidden states and head, with the gradients of both, or of the hidden states."""
    side, c = SIDES[framework](), language_config(QWEN)
    kernels = side.kernels()
    function = next(kernels.load(r.function) for r in kernels.table if (r.operator, r.name) == ("cross_entropy", name))

    def passes(A: int, V: int) -> Callable[[], list]:
        call = replace(make_call(Shape("cross_entropy", {"A": A, "C": c.width, "V": V})), differentiate=2 if trained else 1)
        both = side.passes("cross_entropy", function, None, call).both
        assert both is not None
        return both

    passes(SMALL, SMALL)()
    both = passes(ANSWERS, c.vocab)
    with Peak() as peak:
        results = both()
    assert results
    return peak.bytes


def peaks(console: Console) -> None:
    """Prints both tables."""
    c, megabytes = language_config(QWEN), lambda size: f"{size / 1e6:.0f}"
    layers = Table(title=f"a decoder layer of {QWEN}, {LENGTH} tokens, forward and backward: MB beside weights and gradients")
    losses = Table(title=f"cross-entropy, {ANSWERS} positions, {c.vocab} tokens: MB beside hidden states and head")
    for table, columns in ((layers, ("composed", "native")), (losses, ("composed", "chunked"))):
        for column in ("", *columns):
            table.add_column(column, justify="right")
    for framework in SIDES:
        layers.add_row(framework, *(megabytes(alone(layer_peak, framework, name)) for name in ("composed", "native")))
    for framework in SIDES:
        for trained in (False, True):
            found = (megabytes(alone(loss_peak, framework, name, trained)) for name in ("composed", "chunked"))
            losses.add_row(f"{framework}, head {'trained' if trained else 'frozen'}", *found)
    console.print(layers)
    console.print(losses)
