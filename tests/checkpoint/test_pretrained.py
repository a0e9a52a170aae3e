"""Publishers' directories: written here by transformers itself, read by our tables."""
import json

import numpy as np
import pytest

from granvit.checkpoint.pretrained import open_pretrained, start_weights, write_pretrained
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.init import initial_value, initial_values
from granvit.models import LanguageConfig, VisionConfig, parameter_shapes, vision_shapes
from tests.helpers import run_config
from tests.toy import ToyEngine

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 (these need torch)
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
VISION = VisionConfig(name="v", image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp=32)
QWEN = LanguageConfig(
    name="q", vocab=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, rope_theta=1e4, norm_eps=1e-6,
    tied_head=True, qkv_bias=True,
)  # fmt: skip
LLAMA = LanguageConfig(**{**QWEN.model_dump(), "name": "l", "tied_head": False, "qkv_bias": False, "chat": "llama-3"})


def siglip(both_towers: bool):
    torch.manual_seed(0)
    config = SiglipConfig(vision_config=SIZES | {"image_size": 32, "patch_size": 8}, text_config=SIZES | {"vocab_size": 64})
    return SiglipModel(config) if both_towers else SiglipVisionModel(config.vision_config)


def decoder(kind: str):
    torch.manual_seed(1)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False))


@pytest.fixture
def published(tmp_path):
    """Directories as publishers ship them; the decoder in bfloat16 and in several files."""
    siglip(True).save_pretrained(tmp_path / "vision")
    decoder("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "language", max_shard_size="4KB")
    return tmp_path


def configuration(directory, **model):
    weights = {"weights_vision": str(directory / "vision"), "weights_language": str(directory / "language")}
    return run_config(model={"init": "pretrained", **weights, **model})


def test_every_parameter_arrives_and_the_projector_is_the_seeded_one(published):
    found = dict(start_weights(configuration(published), VISION, QWEN))
    assert {n: a.shape for n, a in found.items()} == parameter_shapes(VISION, QWEN)
    theirs = {f"vision.{n}": p for n, p in siglip(True).vision_model.state_dict().items()}
    theirs |= {f"language.{n}": p.to(torch.bfloat16).float() for n, p in decoder("qwen2").state_dict().items()}
    for name, array in found.items():
        seeded = name.startswith("projector")
        expected = initial_value(name, array.shape, 0) if seeded else theirs[name].detach().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_the_vision_tower_alone_with_and_without_its_prefix(published, tmp_path, prefix):
    directory = tmp_path / "tower"
    siglip(False).save_pretrained(directory)
    tensors = {n.replace("vision_model.", prefix): t for n, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    found = dict(start_weights(configuration(published, weights_vision=str(directory)), VISION, QWEN))
    name = "encoder.layers.1.mlp.fc2.weight"
    np.testing.assert_array_equal(found[f"vision.{name}"], siglip(False).vision_model.state_dict()[name].numpy())


def test_llama_with_its_own_head(published, tmp_path):
    decoder("llama").save_pretrained(tmp_path / "llama")
    found = dict(start_weights(configuration(published, weights_language=str(tmp_path / "llama")), VISION, LLAMA))
    np.testing.assert_array_equal(found["language.lm_head.weight"], decoder("llama").lm_head.weight.detach().numpy())


def edit(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_tensor_that_no_row_maps_is_named(published):
    edit(published / "vision", lambda t: t.update({"vision_model.encoder.layers.0.rogue.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"model\.safetensors.*vision_model\.encoder\.layers\.0\.rogue\.weight"):
        start_weights(configuration(published), VISION, QWEN)


def test_a_row_that_no_tensor_meets_is_named(published):
    edit(published / "vision", lambda t: t.pop("vision_model.encoder.layers.1.mlp.fc1.bias"))
    with pytest.raises(ValueError, match=r"config\.json.*vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias"):
        start_weights(configuration(published), VISION, QWEN)


def test_blocks_above_the_level_are_left_out_but_not_blocks_beyond_the_model(published):
    def without_last_block(tensors):  # like LLaVA's towers, which keep the closing norm
        for name in [name for name in tensors if "vision_model.encoder.layers.2." in name]:
            del tensors[name]

    edit(published / "vision", without_last_block)
    assert start_weights(configuration(published), VISION, QWEN)
    edit(published / "vision", lambda t: t.update({"vision_model.encoder.layers.7.mlp.fc1.bias": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"vision_model\.encoder\.layers\.7\.mlp\.fc1\.bias"):
        start_weights(configuration(published), VISION, QWEN)


@pytest.mark.parametrize(
    "part, key, value, field",
    [("vision", "num_attention_heads", 4, "heads"), ("language", "rms_norm_eps", 1e-5, "norm_eps"),
     ("language", "rope_theta", 5e5, "rope_theta"), ("language", "num_key_value_heads", 1, "kv_heads")],
)  # fmt: skip
def test_a_config_json_of_another_model_names_the_field(published, part, key, value, field):
    path = published / part / "config.json"
    tree = json.loads(path.read_text())
    (tree["vision_config"] if part == "vision" else tree)[key] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"{part}/config\.json.*\b{field}\b"):
        start_weights(configuration(published), VISION, QWEN)


@pytest.mark.parametrize("top", [None, "final"])
def test_a_directory_that_still_calls_the_built_level_top_is_read(published, top):
    written = VisionConfig(**{**VISION.model_dump(exclude={"built_level"}), "top": top})
    shapes = vision_shapes(written)
    for path in (published / "vision").iterdir():
        path.unlink()
    write_pretrained(published / "vision", written, None, shapes, initial_values(shapes, 0).items())
    path = published / "vision" / "config.json"
    tree = json.loads(path.read_text())
    del tree["vision"]["built_level"]
    tree["vision"]["top"] = top
    path.write_text(json.dumps(tree))
    assert open_pretrained(published / "vision", "vision").vision == written
    assert {n: a.shape for n, a in start_weights(configuration(published), VISION, QWEN)} == parameter_shapes(VISION, QWEN)


def test_transformers_5_writes_rope_parameters(published):
    path = published / "language" / "config.json"
    tree = json.loads(path.read_text())
    tree["rope_parameters"] = {"rope_theta": tree.pop("rope_theta"), "rope_type": "default"}
    path.write_text(json.dumps(tree))
    assert start_weights(configuration(published), VISION, QWEN)


@pytest.mark.parametrize(
    "stated, named",
    [({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
     ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),  # as Qwen2.5's cards say for long texts
     ({"use_sliding_window": True}, "use_sliding_window True")],
)  # fmt: skip
def test_scaled_rotary_angles_and_windows_are_refused(published, stated, named):
    path = published / "language" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    with pytest.raises(ValueError, match=rf"language/config\.json.*{named}"):
        start_weights(configuration(published), VISION, QWEN)


@pytest.mark.parametrize("missing", ["vision", "language"])
def test_a_missing_directory_says_what_belongs_there_and_how_to_do_without(published, missing):
    config = configuration(published, **{f"weights_{missing}": "nowhere/at-all"})
    expected = rf"model\.weights_{missing}.*nowhere/at-all.*config\.json.*model\.init=random"
    with pytest.raises(ValueError, match=expected):
        start_weights(config, VISION, QWEN)


def test_another_family_is_refused_by_its_model_type(published):
    config = configuration(published, weights_vision=str(published / "language"))
    with pytest.raises(ValueError, match=r"'qwen2'.*model\.weights_vision.*siglip"):
        start_weights(config, VISION, QWEN)


def test_a_truncated_file_is_named(published):
    path = published / "vision" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"vision/model\.safetensors"):
        start_weights(configuration(published), VISION, QWEN)


def test_a_run_with_another_decoder_gives_its_encoder_alone_and_says_so(tmp_path, caplog):
    config = run_config(output=str(tmp_path / "run"))
    writer = CheckpointWriter(tmp_path / "run", config, VISION, QWEN)
    start = writer.record_start(initial_values(parameter_shapes(VISION, QWEN), 5).items())
    engine = ToyEngine(config, VISION, QWEN, start)
    writer.save(engine, 1, {"questions": 0, "skipped": 0})
    next_run = run_config(model={"init": "random", "init_from": str(tmp_path / "run")})
    with caplog.at_level("INFO", logger="granvit"):
        found = dict(start_weights(next_run, VISION, LLAMA))
    assert {n: a.shape for n, a in found.items()} == parameter_shapes(VISION, LLAMA)
    for name, array in found.items():
        seed = 5 if name.startswith("vision") else 0
        np.testing.assert_array_equal(array, initial_value(name, array.shape, seed), err_msg=name)
    (line,) = [record.message for record in caplog.records if "'q'" in record.message]
    assert all(word in line for word in ("'l'", "encoder", "projector", "decoder"))
    with pytest.raises(ValueError, match=r"vision\.encoder\.layers\.[23]\."):
        start_weights(next_run, VISION.model_copy(update={"layers": 4}), LLAMA)


def test_a_model_written_by_a_later_version_is_refused_by_the_key_that_is_new(tmp_path):
    shapes = vision_shapes(VISION)
    write_pretrained(tmp_path, VISION, None, shapes, initial_values(shapes, 0).items())
    assert open_pretrained(tmp_path, "vision").vision == VISION
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    tree["vision"]["registers"] = 4
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"config\.json.*registers"):
        open_pretrained(tmp_path, "vision")


def test_a_projector_of_another_width_is_no_start(tmp_path):
    """A run with another decoder, or a wider or tiled encoder: one line with the file, both values and the remedy."""
    config = run_config(stage="projector", output=str(tmp_path / "run"), data={"mix": {"conversation": 1.0}})
    writer = CheckpointWriter(tmp_path / "run", config, VISION, QWEN)
    start = writer.record_start(initial_values(parameter_shapes(VISION, QWEN), 5).items())
    writer.save(ToyEngine(config, VISION, QWEN, start), 1, {"questions": 0, "skipped": 0})
    next_run = run_config(model={"init_from": str(tmp_path / "run")})
    assert dict(start_weights(next_run, VISION, QWEN)).keys() == parameter_shapes(VISION, QWEN).keys()
    remedy = r"model\.init_from=null"
    file = f"{tmp_path}/run/checkpoints/step_0000001"
    widths = f"'q'.*{QWEN.width}.*'l'.*{LLAMA.width}"
    with pytest.raises(ValueError, match=rf"{file}.*{widths}.*{remedy}"):
        start_weights(next_run, VISION, LLAMA)
    tiled = VISION.model_copy(update={"tiles": 2})
    width = VISION.width
    shapes = rf"projector\.linear_1\.weight.*\[{QWEN.width}, {width}\].*\[{QWEN.width}, {4 * width}\]"
    with pytest.raises(ValueError, match=rf"{file}.*{shapes}.*{remedy}"):
        start_weights(next_run, tiled, QWEN)


def test_a_decoder_named_beside_a_run_that_has_one_is_said_to_give_its_tokenizer_alone(published, tmp_path, caplog):
    config = configuration(published)
    writer = CheckpointWriter(tmp_path / "run", config, VISION, QWEN)
    writer.save(ToyEngine(config, VISION, QWEN, writer.record_start(start_weights(config, VISION, QWEN))), 1, {})
    for named, said in ((str(published / "language"), False), ("weights/another", True)):
        with caplog.at_level("WARNING", logger="granvit"):
            dict(start_weights(configuration(published, init_from=str(tmp_path / "run"), weights_language=named), VISION, QWEN))
        assert ("weights/another" in caplog.text) == said
