"""Conversion between layouts: files written by transformers and MindSpore themselves, read and written by our tables."""
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from granvit.checkpoint.convert import convert, lines, main
from granvit.checkpoint.layouts.mindspore import CkptFile, CkptWriter
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.checkpoint.source import open_source
from granvit.checkpoint.tensors import TensorSet, TensorWriter, write_set
from granvit.config import language_config, vision_config
from granvit.init import initial_value
from granvit.models import parameter_shapes
from parity.mindformers_llama import FORCED
from tests.helpers import run_config
from tests.toy import ToyEngine

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 (these need torch)
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
BF16 = torch.bfloat16


def model(kind: str):
    """A tiny model of transformers with random weights in bfloat16, none of them 0 or 1."""
    torch.manual_seed(0)
    if kind in ("siglip", "siglip-tower"):
        config = SiglipConfig(vision_config=TOWER, text_config=SIZES | {"vocab_size": 64})
        made = SiglipModel(config) if kind == "siglip" else SiglipVisionModel(config.vision_config)
    elif kind == "clip":
        made = CLIPModel(CLIPConfig(vision_config=TOWER, text_config=SIZES | {"vocab_size": 64}, projection_dim=16))
    elif kind == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True))
    elif kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False))
    else:
        tied = kind == "llava-qwen2"
        text = TEXT | {"model_type": "qwen2" if tied else "llama", "tie_word_embeddings": tied}
        siglip = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
        made = LlavaForConditionalGeneration(
            LlavaConfig(TOWER if kind == "llava-clip" else siglip, text, image_token_index=5, tie_word_embeddings=tied,
                        vision_feature_select_strategy="default" if kind == "llava-clip" else "full")
        )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.to(BF16).eval()


KINDS = {"siglip": "siglip", "siglip-tower": "siglip", "qwen2": "qwen2", "llama": "llama", "llava-qwen2": "llava",
         "llava-llama": "llava", "clip": "clip", "llava-clip": "llava"}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directories as publishers ship them, by kind; the decoders in several files."""
    root = tmp_path_factory.mktemp("published")
    for kind in KINDS:
        model(kind).save_pretrained(root / kind, **({"max_shard_size": "8KB"} if kind in ("qwen2", "llava-qwen2") else {}))
    return root


@pytest.fixture
def editable(published, tmp_path):
    """Copies one kind's directory in one file, after a change to its tensors and to its config.json."""

    def make(kind: str, change=lambda tensors: None, **config) -> Path:
        into = tmp_path / f"edited-{kind}"
        into.mkdir()
        tensors = {n: t for path in sorted((published / kind).glob("*.safetensors")) for n, t in load_file(path).items()}
        change(tensors)
        save_file(tensors, into / "model.safetensors")
        tree = json.loads((published / kind / "config.json").read_text()) | config
        (into / "config.json").write_text(json.dumps(tree))
        return into

    return make


def raw(path: Path) -> dict[str, tuple]:
    """Names, shapes, dtypes and bytes of a directory or a .ckpt file."""
    tensors = open_source(path).tensors
    return {n: (s, tensors.read(n).dtype, tensors.read(n).tobytes()) for n, s in tensors.shapes.items()}


def refused(capsys, source: Path, destination: Path, to: str, *more: str) -> str:
    """Runs the command, which must refuse in one line, with exit status 2, and leave nothing; returns the line."""
    before = set(destination.parent.iterdir())
    assert main([str(source), str(destination), "--to", to, *more]) == 2
    assert set(destination.parent.iterdir()) == before and not destination.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_identical_in_raw_bytes(published, tmp_path, kind):
    source, there, back = published / kind, tmp_path / "default", tmp_path / "back"
    report = convert(source, there, "default")
    assert (report.from_layout, report.verified) == (KINDS[kind], True)
    again = convert(there, back, KINDS[kind])
    expected = {n: value for n, value in raw(source).items() if n not in report.left_out}
    assert raw(back) == expected and not again.left_out and not again.filled
    assert {value[1] for value in expected.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert {n.split(".")[0] for n in raw(there)} <= {"vision", "projector", "language"}


@pytest.mark.parametrize("kind", ["llama", "llava-qwen2", "llava-clip", "siglip-tower"])
def test_transformers_loads_what_comes_back(published, tmp_path, kind):
    convert(published / kind, tmp_path / "default", "default")
    convert(tmp_path / "default", tmp_path / "back", KINDS[kind])
    original = model(kind)
    extra = {"config": SiglipVisionModel.config_class.from_pretrained(tmp_path / "back")} if kind == "siglip-tower" else {}
    found, info = type(original).from_pretrained(tmp_path / "back", dtype=BF16, output_loading_info=True, **extra)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = original.state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name
    if kind.startswith("llava"):
        ids = torch.tensor([[1, *[5] * 16, 7, 8]])
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32).to(BF16)}
        theirs = type(original).from_pretrained(published / kind, dtype=BF16)  # `original` has its rotary angles in bfloat16
        with torch.no_grad():
            assert torch.equal(found.eval()(**inputs).logits, theirs.eval()(**inputs).logits)


def test_what_is_left_out_is_said_with_the_reason(published, tmp_path, capsys):
    assert main([str(published / "siglip"), str(tmp_path / "default"), "--to", "default"]) == 0
    output = capsys.readouterr().out
    assert "left out text_model.* (" in output and "tensors): the text tower" in output
    assert "left out logit_scale: the towers' contrastive loss" in output
    assert "left out vision_model.head.* (" in output and "the pooling head" in output
    assert "peak memory" in output and "verified" in output
    assert not any("text" in name for name in raw(tmp_path / "default"))


def test_an_old_files_integer_positions_are_left_out(editable, tmp_path):
    name = "vision_model.embeddings.position_ids"
    source = editable("siglip-tower", replace(name, torch.arange(16)))
    assert "old files" in convert(source, tmp_path / "default", "default").left_out[name]


def test_a_tower_without_its_prefix_comes_back_without_it(editable, tmp_path):
    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("vision_model.")] = tensors.pop(name)

    source = editable("siglip-tower", bare)
    report = convert(source, tmp_path / "default", "default")
    convert(tmp_path / "default", tmp_path / "back", "siglip")
    assert raw(tmp_path / "back") == {n: v for n, v in raw(source).items() if n not in report.left_out}


def test_llavas_newer_spelling_is_read(editable, published, tmp_path):
    old = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
           "multi_modal_projector.": "model.multi_modal_projector.", "language_model.lm_head.": "lm_head."}  # fmt: skip

    def newer(tensors):
        for name in list(tensors):
            prefix = next(p for p in old if name.startswith(p))
            tensors[old[prefix] + name.removeprefix(prefix)] = tensors.pop(name)

    convert(editable("llava-llama", newer), tmp_path / "newer", "default")
    convert(published / "llava-llama", tmp_path / "older", "default")
    assert raw(tmp_path / "newer") == raw(tmp_path / "older")


@pytest.mark.parametrize("kind", ["llava-llama", "llava-clip"])
def test_a_llava_of_transformers_5_has_no_vision_model_inside(editable, published, tmp_path, kind):
    def bare(tensors):
        for name in list(tensors):
            tensors[name.replace("vision_tower.vision_model.", "vision_tower.")] = tensors.pop(name)

    source = editable(kind, bare)
    convert(source, tmp_path / "newer", "default")
    convert(published / kind, tmp_path / "older", "default")
    assert raw(tmp_path / "newer") == raw(tmp_path / "older")
    convert(tmp_path / "newer", tmp_path / "back", "llava")
    assert raw(tmp_path / "back") == raw(source)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("destination", ["mf.ckpt", "mf", "mf.safetensors"])
def test_mindformers_there_and_back(published, tmp_path, kind, destination):
    there, back = tmp_path / destination, tmp_path / "back"
    convert(published / kind, there, "mindformers")
    found, theirs = raw(there), raw(published / kind)
    words = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
             "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "tok_embeddings.embedding_weight": "embed_tokens.weight", "norm_out": "norm"}  # fmt: skip
    for name, value in found.items():
        word = next((w for w in words if w in name), "lm_head")
        assert value == theirs[name.replace(word, words.get(word, word))], name
    assert len(found) == len(theirs) and ("lm_head.weight" in found) == (kind == "llama")
    assert ("model.layers.0.attention.wk.bias" in found) == (kind == "qwen2")
    report = convert(there, back, kind)
    assert report.from_layout == "mindformers" and raw(back) == raw(published / kind)


ASK_MINDFORMERS = """
import json, sys
import mindspore as ms
import numpy as np
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

directory, out = sys.argv[1:]
config = json.load(open(f"{directory}/config.json")) | json.loads(sys.stdin.read())
config.pop("model_type")
ms.set_context(mode=ms.GRAPH_MODE)
model = LlamaForCausalLM(LlamaConfig(**config))
model.set_train(False)
missing = ms.load_param_into_net(model, ms.load_checkpoint(f"{directory}/model.ckpt"))
assert missing == ([], []), missing
np.save(f"{out}/logits.npy", model(ms.Tensor(np.load(f"{out}/ids.npy")))[0].asnumpy())
ms.save_checkpoint(model, f"{out}/own.ckpt")
"""


@pytest.mark.skipif(importlib.util.find_spec("mindformers") is None, reason="mindformers is not installed")
def test_mindformers_itself_loads_what_is_written_and_what_it_writes_is_read(published, tmp_path):
    convert(published / "qwen2", tmp_path / "mf", "mindformers")
    ids = np.random.default_rng(0).integers(1, 64, (2, 7)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    command = [sys.executable, "-c", ASK_MINDFORMERS, str(tmp_path / "mf"), str(tmp_path)]
    settings = json.dumps(FORCED | {"seq_length": ids.shape[1]})
    environment = os.environ | {"RUN_MODE": "train", "LOCAL_DEFAULT_PATH": str(tmp_path)}
    child = subprocess.run(command, input=settings, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    peer = Qwen2ForCausalLM.from_pretrained(published / "qwen2").float().eval()
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=2e-5, atol=2e-5)
    report = convert(tmp_path / "own.ckpt", tmp_path / "back", "qwen2", "mindformers")
    assert report.from_layout == "mindformers"
    back, theirs = open_source(tmp_path / "back").tensors, open_source(published / "qwen2").tensors
    assert back.shapes == theirs.shapes
    for name in theirs.shapes:  # MindFormers holds float32 on CPU
        np.testing.assert_array_equal(back.read(name), theirs.read(name).astype(np.float32), err_msg=name)


def test_a_ckpt_written_here_loads_in_mindspore(published, tmp_path):
    mindspore = pytest.importorskip("mindspore")
    convert(published / "qwen2", tmp_path / "default", "default")
    convert(tmp_path / "default", tmp_path / "model.ckpt", "mindspore")
    loaded = mindspore.load_checkpoint(str(tmp_path / "model.ckpt"))
    expected = raw(tmp_path / "default")
    assert loaded.keys() == expected.keys()
    for name, (shape, _, content) in expected.items():
        assert loaded[name].dtype == mindspore.bfloat16 and loaded[name].shape == shape
        assert loaded[name].get_bytes() == content, name


@pytest.mark.parametrize("crc", [False, True])
def test_a_ckpt_written_by_mindspore_is_read(tmp_path, monkeypatch, crc):
    mindspore = pytest.importorskip("mindspore")
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KB: larger tensors are written in slices
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(40, 33)).astype(np.float32), "b.weight": rng.normal(size=7).astype(np.float16),
              "scalar": np.float32(2.5).reshape(())}  # fmt: skip
    parameters = [{"name": n, "data": mindspore.Tensor(a)} for n, a in arrays.items()]
    parameters.append({"name": "half", "data": mindspore.Tensor(arrays["a"], mindspore.bfloat16)})
    path = tmp_path / "theirs.ckpt"
    mindspore.save_checkpoint(parameters, str(path), crc_check=crc)
    found = CkptFile(path)
    assert len(found.entries["a"]["spans"]) > 1
    for name, array in arrays.items():
        assert found.read(name).dtype == array.dtype
        np.testing.assert_array_equal(found.read(name), array)
        assert found.digest(name) == hashlib.sha256(array.tobytes()).hexdigest()
    np.testing.assert_array_equal(found.read("half"), arrays["a"].astype(ml_dtypes.bfloat16))
    whole = path.read_bytes()
    for length in (len(whole) - 30, len(whole) // 2, 5, 1):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.ckpt"):
            CkptFile(tmp_path / "cut.ckpt")
    if crc:
        (tmp_path / "flipped.ckpt").write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        with pytest.raises(ValueError, match="checksum"):
            CkptFile(tmp_path / "flipped.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint: the decoder frozen, the tower without its last block."""
    directory = tmp_path_factory.mktemp("run")
    config, vision, language = run_config(), vision_config("tiny-vision"), language_config("tiny-language")
    shapes = parameter_shapes(vision, language)
    writer = CheckpointWriter(directory, config, vision, language)
    start = writer.record_start((n, initial_value(n, s, 0)) for n, s in shapes.items())
    engine = ToyEngine(config, vision, language, start)
    writer.save(engine, 2, {})
    return directory, engine


def test_a_runs_checkpoint_becomes_a_llava_that_transformers_loads(run, tmp_path):
    directory, engine = run
    report = convert(directory, tmp_path / "llava", "llava")
    assert all(".layers.2." in name or "post_layernorm" in name for name in report.filled) and report.filled
    assert any(line.startswith("added vision_tower.vision_model.") for line in lines(report))
    found, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (found.config.vision_feature_layer, found.config.text_config.head_dim) == (-2, 8)
    state = found.state_dict()
    for name, value in engine.weights.items():
        theirs = name.replace("vision.", "model.vision_tower.vision_model.", 1) if name.startswith("vision.") else name
        theirs = theirs.replace("projector.", "model.multi_modal_projector.").replace("language.model.", "model.language_model.")
        np.testing.assert_array_equal(state[theirs].numpy(), value, err_msg=name)
    back = convert(tmp_path / "llava", tmp_path / "back", "default")
    assert set(back.left_out) == set(report.filled)
    assert raw(tmp_path / "back") == raw(directory)


def test_a_checkpoint_gives_its_decoder_and_its_encoder(run, tmp_path):
    directory, engine = run
    checkpoint = directory / "checkpoints" / "step_0000002"
    report = convert(checkpoint, tmp_path / "qwen2", "qwen2")
    assert report.left_out["projector.linear_1.weight"] == "the 'qwen2' layout has only: language"
    found = Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2")
    np.testing.assert_array_equal(found.model.norm.weight.detach(), engine.weights["language.model.norm.weight"])
    assert found.config.tie_word_embeddings and found.config.rope_theta == 1e4
    convert(checkpoint, tmp_path / "all.ckpt", "mindspore")
    assert raw(tmp_path / "all.ckpt") == raw(directory)
    convert(checkpoint, tmp_path / "siglip", "siglip")
    _, info = SiglipVisionModel.from_pretrained(tmp_path / "siglip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    back = convert(tmp_path / "siglip", tmp_path / "vision", "default")
    assert len(back.left_out) == len(vision_fillers()) and raw(tmp_path / "vision").items() <= raw(directory).items()
    file = tmp_path / "siglip" / "model.safetensors"  # as if trained further: then the block is not a filler
    tensors = load_file(file)
    tensors["vision_model.encoder.layers.2.mlp.fc2.bias"] += 1
    save_file(tensors, file)
    assert not convert(tmp_path / "siglip", tmp_path / "trained", "default").left_out


def vision_fillers() -> list[str]:
    """Names above the tiny encoder's level: a block of 8 matrices and norms with their biases, and the closing norm."""
    return [f"{m}.{p}" for m in range(9) for p in ("weight", "bias")]


def test_a_head_that_is_the_embedding_once_more_is_left_out_unless_it_differs(editable, tmp_path, capsys):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    report = convert(editable("qwen2", copy), tmp_path / "default", "default")
    assert "tied" in report.left_out["lm_head.weight"]

    def another(tensors):
        copy(tensors)
        tensors["lm_head.weight"][3, 2] += 1

    (tmp_path / "second").mkdir()
    source = tmp_path / "edited-qwen2"
    source.rename(tmp_path / "first")
    error = refused(capsys, editable("qwen2", another), tmp_path / "second" / "out", "default")
    assert "model.safetensors: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'" in error


def remove(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    "kind, change, config, expected",
    [
        ("qwen2", replace("model.layers.0.rogue.weight", torch.ones(2)), {}, "model.safetensors.*model.layers.0.rogue.weight"),
        ("qwen2", remove("model.layers.1.mlp.up_proj.weight"), {}, "config.json.*model.layers.1.mlp.up_proj.weight"),
        ("llama", remove("lm_head.weight"), {}, "lm_head.weight"),
        ("qwen2", replace("model.norm.weight", torch.ones(3)), {}, "model.safetensors.*model.norm.weight.*[3]"),
        ("qwen2", lambda t: None, {"intermediate_size": 48}, "model.safetensors.*config.json.*.mlp..*[32, 16].*[48, 16]"),
        ("qwen2", replace("model.norm.weight", torch.ones(16, dtype=torch.int64)), {}, "'model.norm.weight'.*I64"),
        ("qwen2", lambda t: None, {"model_type": "gpt2"}, "config.json.*'gpt2'.*qwen2"),
        ("qwen2", lambda t: None, {"rope_scaling": {"rope_type": "yarn"}}, "config.json.*rope_type 'yarn'"),
        ("llama", lambda t: None, {"model_type": "qwen2"}, "k_proj.bias"),
        ("siglip-tower", lambda t: None, {"hidden_act": "relu"}, "config.json.*hidden_act 'relu'"),
        ("llava-llama", lambda t: None, {"vision_feature_layer": -3}, "config.json.*vision_feature_layer -3"),
        ("llava-clip", lambda t: None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ("llava-llama", lambda t: [t.pop(n) for n in list(t) if ".layers.2." in n and "vision_tower" in n],
         {"vision_feature_layer": -1}, "vision.built_level 'penultimate' is below vision.level 'final'"),
        ("llava-llama", lambda t: None, {"vision_config": {"model_type": "sam"}}, "vision_config.model_type 'sam'"),
        ("llava-clip", lambda t: None, {"vision_config": {"num_hidden_layers": 10**9}}, "config.json.*1000000000"),
        ("siglip-tower", lambda t: t.update({"embeddings.position_embedding.weight":
            t["vision_model.embeddings.position_embedding.weight"].clone()}), {},
         "'vision_model.embeddings.position_embedding.weight'.*'embeddings.position_embedding.weight'"),
        ("siglip-tower", lambda t: t.update({"post_layernorm.weight": t.pop("vision_model.post_layernorm.weight")}), {},
         "'post_layernorm.weight'.*'vision_model.post_layernorm.weight'"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(editable, tmp_path, capsys, kind, change, config, expected):
    source = editable(kind, change, **config)
    error = refused(capsys, source, tmp_path / "out", "default")
    for part in expected.split(".*"):
        assert part in error
    assert str(source) in error


def sharded(published, tmp_path) -> tuple[Path, list[Path]]:
    source = tmp_path / "sharded"
    source.mkdir()
    for path in (published / "qwen2").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    return source, sorted(source.glob("model-*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "duplicate", "no index", "listed elsewhere"])
def test_damaged_shards_are_named(published, tmp_path, capsys, damage):
    source, shards = sharded(published, tmp_path)
    index = source / "model.safetensors.index.json"
    expected = shards[1].name
    if damage == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-3])
    elif damage == "missing":
        shards[1].unlink()
    elif damage == "duplicate":
        first, second = load_file(shards[0]), load_file(shards[1])
        save_file(second | first, shards[1])
        expected = shards[0].name
    elif damage == "no index":
        index.unlink()
        expected = index.name
    else:
        tree = json.loads(index.read_text())
        tree["weight_map"]["model.layers.7.rogue"] = shards[0].name
        index.write_text(json.dumps(tree))
        expected = "'model.layers.7.rogue'"
    assert expected in refused(capsys, source, tmp_path / "out", "default")


def test_one_name_twice_in_a_file_is_refused(tmp_path, capsys):
    array = np.ones((2, 2), np.float32)
    shapes = {"a": (2, 2), "b": (2, 2)}
    with CkptWriter(tmp_path / "twice.ckpt", shapes) as writer:
        writer.add("a", array)
        writer.add("b", array)
        writer.finish()
    content = (tmp_path / "twice.ckpt").read_bytes()
    (tmp_path / "twice.ckpt").write_bytes(content + content[: len(content) // 2])
    assert "twice.ckpt: tensor 'a' is there twice" in refused(capsys, tmp_path / "twice.ckpt", tmp_path / "out", "default")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "double.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    error = refused(capsys, tmp_path / "double.safetensors", tmp_path / "out", "default")
    assert "the key 'a' is there twice" in error


def test_a_pickle_is_refused_with_a_word_on_why(published, tmp_path, capsys):
    source = tmp_path / "pickled"
    source.mkdir()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "lightning.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for path in (source, source / "pytorch_model.bin", tmp_path / "lightning.ckpt", tmp_path / "old.ckpt"):
        error = refused(capsys, path, tmp_path / "out", "default")
        assert "is a pickle" in error and "runs the code in it" in error


def test_the_layout_can_be_named_and_must_be_where_names_do_not_decide(published, tmp_path, capsys):
    convert(published / "llama", tmp_path / "one.safetensors", "llama")
    report = convert(tmp_path / "one.safetensors", tmp_path / "named", "default", from_="llama")
    assert report.from_layout == "llama" and "no config.json" in report.notes[0]
    assert convert(tmp_path / "one.safetensors", tmp_path / "found", "default").from_layout == "llama"
    error = refused(capsys, tmp_path / "one.safetensors", tmp_path / "out", "default", "--from", "siglip")
    assert "one.safetensors: tensor 'lm_head.weight' is in no row of the 'siglip' layout" in error
    write_set(tmp_path, "head", {"lm_head.weight": (2, 2)}, [("lm_head.weight", np.ones((2, 2), np.float32))])
    error = refused(capsys, tmp_path / "head.safetensors", tmp_path / "out", "default")
    assert "several layouts (qwen2, llama, llava, mindformers); name one with --from" in error
    write_set(tmp_path, "odd", {"what": (2,)}, [("what", np.ones(2, np.float32))])
    assert "'what'" in refused(capsys, tmp_path / "odd.safetensors", tmp_path / "out", "default")


def test_what_a_layout_has_no_words_for_is_refused(published, tmp_path, capsys):
    assert "'llama'" in refused(capsys, published / "llama", tmp_path / "out", "qwen2")
    assert "'qwen2'" in refused(capsys, published / "qwen2", tmp_path / "out", "llama")
    lacking = refused(capsys, published / "qwen2", tmp_path / "out", "llava")
    assert "projector" in lacking and "vision" in lacking
    existing = tmp_path / "there"
    existing.mkdir()
    with pytest.raises(ValueError, match=str(existing)):
        convert(published / "llama", existing, "default")
    with pytest.raises(ValueError, match=str(tmp_path / "nowhere")):
        convert(tmp_path / "nowhere", tmp_path / "out", "default")
    with pytest.raises(ValueError, match=r"'gguf'.*llama"):
        convert(published / "llama", tmp_path / "out", "gguf")


def test_a_disk_that_fails_leaves_nothing(published, tmp_path, monkeypatch, capsys):
    def full(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "add", full)
    assert "No space left" in refused(capsys, published / "llama", tmp_path / "out", "default")


def test_bytes_that_read_back_differently_are_refused(published, tmp_path, monkeypatch, capsys):
    finish = TensorWriter.finish

    def spoil(self):
        digests = finish(self)
        with open(self.directory / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        return digests

    monkeypatch.setattr(TensorWriter, "finish", spoil)
    assert "reads back differently" in refused(capsys, published / "llama", tmp_path / "out", "default")
    assert not convert(published / "llama", tmp_path / "unverified", "default", verify=False).verified


def test_large_sets_come_in_several_files_with_an_index(published, tmp_path, monkeypatch):
    monkeypatch.setattr("granvit.checkpoint.convert.SHARD_BYTES", 4000)
    convert(published / "qwen2", tmp_path / "default", "default")
    convert(tmp_path / "default", tmp_path / "back", "qwen2")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and index["weight_map"].keys() == raw(published / "qwen2").keys()
    assert raw(tmp_path / "back") == raw(published / "qwen2")
    _, info = Qwen2ForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


CHILD = """
import sys
from pathlib import Path
from granvit.checkpoint.convert import convert

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc")
@pytest.mark.parametrize("destination, to", [("default", "default"), ("mf.ckpt", "mindformers")])
def test_no_two_large_tensors_are_in_memory_at_once(tmp_path, destination, to):
    """200 MB of which the embedding is 48: the peak grows by one of them."""
    layers, width, mlp, vocab = 3, 512, 12288, 24576
    source = tmp_path / "large"
    source.mkdir()
    tree = {"model_type": "qwen2", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": False}  # fmt: skip
    (source / "config.json").write_text(json.dumps(tree))
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {f"{block}.mlp.{p}_proj.weight": (mlp, width) for p in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, mlp)}
        for p, out in (("q", width), ("k", 128), ("v", 128)):
            shapes |= {f"{block}.self_attn.{p}_proj.weight": (out, width), f"{block}.self_attn.{p}_proj.bias": (out,)}
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, width)
    dtype = np.dtype(ml_dtypes.bfloat16)
    with TensorWriter(source, "model", shapes, checksums=False) as writer:
        for name, shape in shapes.items():
            writer.add(name, np.full(shape, 0.5, dtype))
        writer.finish()
    largest = vocab * width * 2
    assert sum(p.stat().st_size for p in source.glob("*.safetensors")) > 6 * largest
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path / destination), to]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * largest + (20 << 20)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "examples:" in output and "--to llava" in output and "mindformers" in output


def test_checksums_of_a_default_directory_are_checked(published, tmp_path, capsys):
    convert(published / "llama", tmp_path / "default", "default")
    path = tmp_path / "default" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "checksum" in refused(capsys, tmp_path / "default", tmp_path / "out", "llama")
    assert TensorSet(tmp_path / "default").shapes
