"""Compares both packages with independent implementations, with the same weights: with transformers' SigLIP, Qwen2 and Llama, and
the MindSpore package with MindFormers' Llama.

transformers in float64 is the golden reference. The outputs of the blocks (transformers' `hidden_states`) are compared, and the
decoder's logits at the answers of one causal segment. In the comparison with MindFormers, MindFormers is the peer: its error sets
the tolerance.
"""
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.data.batch import Batch
from granvit.introspection import INPUTS
from parity import mindformers_llama
from parity.capture import Request, Tensors, configured, open_model
from parity.compare import Row, compare_suite
from parity.fixture import Fixture, start_values


def without_transformers() -> str:
    """Why no comparison is possible (empty if it is): transformers is the golden reference of all of them."""
    if importlib.util.find_spec("transformers") is None:
        return "peers: transformers is not installed (pip install -e '.[test]'); nothing was compared"
    return ""


def without_mindformers(precision: str) -> str:
    """Why MindFormers' Llama is not compared (empty if it is)."""
    if importlib.util.find_spec("mindformers") is None:
        return "peers: MindFormers is not installed (pip install -e '.[test-mindspore]'); its Llama was not compared"
    if precision != "float32":
        return f"peers: MindFormers' Llama was not compared: on CPU it runs in float32, not in {precision}"
    return ""


def notes(precision: str) -> list[str]:
    """Which comparisons are not made, and why."""
    return [note for note in [without_transformers() or without_mindformers(precision)] if note]


def golden(fixture: Fixture, batch: Batch) -> Tensors:
    """The activations of transformers, under the names of `granvit.introspection`."""
    return _encoder(fixture, batch) | _decoder(fixture, batch)


def _encoder(fixture: Fixture, batch: Batch) -> Tensors:
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    c = fixture.vision
    if not fixture.is_siglip:
        return {}
    blocks = c.built_layers + 1  # one more, not used: transformers gives the last block's output only after the closing norm
    peer = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=blocks, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=c.patch_size, layer_norm_eps=c.norm_eps, hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )).double().eval()  # fmt: skip
    _fill(peer, fixture.weights, SIGLIP, (f"vision_model.encoder.layers.{c.built_layers}.", "vision_model.post_layernorm"))
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (c.mean, c.std))
    pixels = (torch.from_numpy(batch.pixels_B3RR).double() / 255 - mean) / std
    with torch.no_grad():
        states = peer(pixel_values=pixels, output_hidden_states=True).hidden_states
    found = {"forward/vision.embeddings": states[0].numpy()}
    return found | {f"forward/vision.encoder.layers.{i}": states[i + 1].numpy() for i in range(c.built_layers)}


def _decoder(fixture: Fixture, batch: Batch) -> Tensors:
    """Outputs of the blocks and logits for `one_segment(batch)`, with the fixture's seeded values as input embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    c = fixture.language
    sizes = dict(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.layers,
                 num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rope_theta=c.rope_theta,
                 rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_head)  # fmt: skip
    peer = Qwen2ForCausalLM(Qwen2Config(**sizes)) if fixture.is_qwen2 else LlamaForCausalLM(LlamaConfig(**sizes))
    peer = peer.double().eval()
    _fill(peer, fixture.weights, QWEN2 if fixture.is_qwen2 else LLAMA, ("lm_head",) if c.tied_head else ())
    rows, length = batch.token_ids_BS.shape
    inputs = fixture.boundary(INPUTS, (rows, length, c.width))[INPUTS][0]
    with torch.no_grad():
        out = peer(inputs_embeds=torch.from_numpy(inputs).double(), output_hidden_states=True)
    found = {f"forward/language.model.layers.{i}": out.hidden_states[i + 1].numpy() for i in range(c.layers - 1)}
    answers = np.arange(rows)[:, None], batch.answer_positions_BA
    name = "language" if c.tied_head else "language.lm_head"
    return found | {f"forward/{name}": out.logits.numpy()[answers]}


def one_segment(batch: Batch) -> Batch:
    """The batch with each row as one causal sequence, which is what transformers computes."""
    rows, length = batch.token_ids_BS.shape
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return replace(batch, positions_BS=positions, segments_BS=np.zeros_like(batch.segments_BS))


def _fill(peer, weights: dict[str, np.ndarray], layout: Layout, unused: tuple[str, ...]) -> None:
    """Copies canonical weights into a transformers model, whose names the layout translates."""
    import torch

    with torch.no_grad():
        for foreign, parameter in peer.named_parameters():
            if not foreign.startswith(unused):
                parameter.copy_(torch.from_numpy(weights[layout.canonical(foreign)]))


def rows(fixture: Fixture, precision: str, kernels: Mapping[str, str]) -> Iterator[Row]:
    """Both packages against transformers, with PyTorch as the peer; then MindSpore's logits, with MindFormers as the peer.
    `kernels`: see `Request`.

    Without transformers there are no rows, without MindFormers none of the second kind (see `notes`).
    """
    if without_transformers():
        return
    batch = one_segment(fixture.batches[0])
    reference = golden(fixture, batch)
    request = Request((), 1, precision, kernels=kernels)
    found = {framework: _ours(fixture, batch, framework, request, reference) for framework in ("torch", "mindspore")}
    yield from compare_suite("peers", reference, found["torch"], found["mindspore"], precision)
    if not without_mindformers(precision):
        fixture = _whole_heads(fixture)
        reference = {name: array for name, array in _decoder(fixture, batch).items() if "layers" not in name}
        (name,) = reference  # the logits
        c, (B, S) = fixture.language, batch.token_ids_BS.shape
        logits_BSV = mindformers_llama.logits(c, fixture.weights, fixture.boundary(INPUTS, (B, S, c.width))[INPUTS][0])
        theirs = {name: logits_BSV[np.arange(B)[:, None], batch.answer_positions_BA]}
        ours = _ours(fixture, batch, "mindspore", request, reference)
        yield from compare_suite("mindformers", reference, theirs, ours, precision, peer_name="MindFormers")


def _ours(fixture: Fixture, batch: Batch, framework: str, request: Request, names: Iterable[str]) -> Tensors:
    """The activations with these names, computed by one of the packages. MindSpore runs in PyNative mode, so nothing is compiled;
    the suites compare its static graph."""
    config = configured(fixture, framework, "stage1", request)
    shapes = fixture.shapes(config)
    opened = open_model(framework, fixture, config, shapes, graph=False)
    capture = opened.capture(batch, fixture.boundary(INPUTS, shapes[INPUTS]), backward=False)
    return {name: capture.activations[name.partition("/")[2]] for name in names}


def _whole_heads(fixture: Fixture) -> Fixture:
    """The fixture with heads of size width / heads, the only size that MindFormers supports."""
    language = fixture.language.model_copy(update={"head_dim": fixture.language.width // fixture.language.heads})
    return replace(fixture, language=language, weights=start_values(fixture.vision, language, fixture.seed))
