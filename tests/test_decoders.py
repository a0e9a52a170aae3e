"""Decoders from their publishers' files, in both packages, against transformers' own model with the same weights."""
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ms = pytest.importorskip("mindspore")

import ms_granvit  # noqa: E402 (after the check that the frameworks are there)
import pt_granvit  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "rope_theta": 5e5, "rms_norm_eps": 1e-5}  # fmt: skip
PACKAGES = pytest.mark.parametrize("package", [pt_granvit, ms_granvit], ids=["torch", "mindspore"])


def peer(family: str):
    """Qwen2 as 1.5B and 3B have it (tied head), as 7B has it (a head of its own), or Llama-3; no norm at 1, no bias at 0."""
    torch.manual_seed(0)
    if family.startswith("qwen2"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=family == "qwen2"))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def logits(decoder, ids_BS: np.ndarray) -> np.ndarray:
    """Of every position of rows that are one causal segment."""
    positions_BS = np.tile(np.arange(ids_BS.shape[1]), (len(ids_BS), 1))
    arrays = ids_BS, positions_BS, np.zeros_like(ids_BS)
    if isinstance(decoder, ms_granvit.CausalDecoder):
        ids, positions, segments = (ms.Tensor(array.astype(np.int32)) for array in arrays)
        return decoder.head(decoder(decoder.embed(ids), positions, segments)).asnumpy()
    ids, positions, segments = map(torch.from_numpy, arrays)
    with torch.no_grad():
        return decoder.head(decoder(decoder.embed(ids), positions, segments)).numpy()


@PACKAGES
@pytest.mark.parametrize(  # transformers 4 writes rope_theta, 5 rope_parameters
    "family, rope", [("qwen2", "rope_theta"), ("qwen2-7b", "rope_parameters"), ("llama", "rope_parameters")]
)
def test_logits_are_those_of_transformers(family, rope, package, tmp_path):
    model = peer(family)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    if rope == "rope_parameters":
        tree = json.loads((tmp_path / "config.json").read_text())
        tree["rope_parameters"] = {"rope_theta": tree.pop("rope_theta"), "rope_type": "default"}
        (tmp_path / "config.json").write_text(json.dumps(tree))
    ids_BS = np.random.default_rng(0).integers(0, 50, (2, 11))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids_BS)).logits.numpy()
    np.testing.assert_allclose(logits(package.load_decoder(tmp_path), ids_BS), expected, rtol=1e-4, atol=2e-5)


@PACKAGES
def test_a_decoder_comes_back_from_its_own_directory_in_either_package(package, tmp_path):
    peer("llama").save_pretrained(tmp_path / "published")
    decoder = package.load_decoder(tmp_path / "published")
    decoder.save_pretrained(tmp_path / "saved")
    ids_BS = np.random.default_rng(0).integers(0, 50, (1, 7))
    for other in (pt_granvit, ms_granvit):
        found = other.load_decoder(tmp_path / "saved")
        assert found.config.model_dump(exclude={"name"}) == decoder.config.model_dump(exclude={"name"})
        np.testing.assert_allclose(logits(found, ids_BS), logits(decoder, ids_BS), rtol=1e-4, atol=2e-5)


@PACKAGES
def test_an_encoder_is_no_decoder(package, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"language.*'siglip'"):
        package.load_decoder(tmp_path)
