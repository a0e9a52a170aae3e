"""The same weights in code that nobody here wrote: transformers' SigLIP, Qwen2 and Llama against the PyTorch twin; and the
encoder's other structures (class token, RMS norm, gated MLP, layer scale ...) in one twin against the other."""
import numpy as np
import pytest

from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.init import initial_values
from granvit.models import LanguageConfig, VisionConfig, vision_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pt_granvit.engine import to_torch  # noqa: E402 (needs torch)
from pt_granvit.language import CausalDecoder  # noqa: E402
from pt_granvit.vision import VisionEncoder  # noqa: E402

ENCODER = VisionConfig(name="v", image_size=32, patch_size=8, width=24, layers=3, heads=2, mlp=40)


def visible(shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values with no norm at 1 and no bias at 0."""
    rng = np.random.default_rng(seed)
    return {n: v + 0.2 * rng.standard_normal(v.shape).astype(np.float32) for n, v in initial_values(shapes, seed).items()}


def randomise(module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def load_foreign(module, prefix: str, peer, layout) -> None:
    """Copies a transformers model's weights into ours through the layout's table."""
    ours = dict(module.named_parameters())
    with torch.no_grad():
        for foreign, value in peer.state_dict().items():
            canonical = layout.canonical(foreign)
            if canonical is not None and canonical.removeprefix(prefix) in ours:
                ours.pop(canonical.removeprefix(prefix)).copy_(value)
    assert not ours


@pytest.mark.parametrize("level", ["penultimate", "final"])  # transformers shows the last block behind its norm only
def test_siglip_features_are_transformers_features(level):
    config = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    peer = transformers.SiglipVisionModel(config).eval()
    randomise(peer)
    ours = VisionEncoder(VisionConfig(**{**ENCODER.model_dump(), "level": level}), torch.float32)
    load_foreign(ours, "vision.", peer, SIGLIP)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        theirs = peer(pixel_values=(pixels / 255 - 0.5) / 0.5, output_hidden_states=True)
        features, _ = ours(pixels)
    expected = theirs.last_hidden_state if level == "final" else theirs.hidden_states[-2]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_decoder_logits_are_transformers_logits(family):
    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=6, rope_theta=5e5, rms_norm_eps=1e-5)  # fmt: skip
    tied = family == "qwen2"
    if family == "qwen2":
        peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    randomise(peer)
    language = LanguageConfig(name="l", vocab=50, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=40, rope_theta=5e5,
                              norm_eps=1e-5, tied_head=tied, qkv_bias=tied)  # fmt: skip
    ours = CausalDecoder(language, torch.float32)
    load_foreign(ours, "language.", peer, QWEN2 if tied else LLAMA)
    ids = torch.randint(0, 50, (2, 11))
    positions = torch.arange(11).expand(2, 11)
    with torch.no_grad():
        logits = ours.head(ours(ours.embed(ids), positions, torch.zeros_like(ids)))
        torch.testing.assert_close(logits, peer.eval()(ids).logits, rtol=1e-5, atol=1e-5)


STRUCTURES = {
    "CLIP": {"class_token": True, "pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "norm_eps": 1e-5},
    "AIMv2": {"norm": "rms", "norm_eps": 1e-5, "patch_norm": True, "gated_mlp": True, "activation": "silu", "bias": False},
    "InternViT": {"class_token": True, "layer_scale": True, "activation": "gelu", "closing_norm": False},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_twins_agree_on_every_structure_of_an_encoder(name):
    ms = pytest.importorskip("mindspore")
    from ms_granvit.engine import fill
    from ms_granvit.vision import VisionEncoder as MindSporeEncoder

    top = "last" if name == "InternViT" else "final"
    config = VisionConfig(**{**ENCODER.model_dump(), "top": top, **STRUCTURES[name]})
    values = visible(vision_shapes(config, "vision"))
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 48, 48)).astype(np.uint8)  # positions are resampled

    ours = VisionEncoder(config, torch.float32, image_size=48)
    assert {f"vision.{n}": tuple(p.shape) for n, p in ours.named_parameters()} == vision_shapes(config)
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            parameter.copy_(to_torch(values[f"vision.{parameter_name}"]))
        expected = [t.numpy() for t in ours(torch.from_numpy(pixels))]

    ms.set_context(mode=ms.GRAPH_MODE)
    theirs = MindSporeEncoder(config, ms.float32, image_size=48)
    fill(theirs.get_parameters(), ((n.removeprefix("vision."), v) for n, v in values.items()))
    for mine, twin in zip(expected, theirs(ms.Tensor(pixels)), strict=True):
        np.testing.assert_allclose(twin.asnumpy(), mine, rtol=1e-4, atol=2e-5)
