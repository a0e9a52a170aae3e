"""The demo's start weights: transformers loads what is published, and the shipped files are those that were published."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, SiglipVisionModel

from granvit.config import language_config, vision_config
from granvit.demo import pair
from granvit.demo.pair import CARD, SHIPPED, check_pair, copy_pair, publish_pair, read_sums
from granvit.init import initial_values
from granvit.models import language_shapes, vision_shapes

VISION, LANGUAGE = vision_config("demo-vision"), language_config("demo-language")


@pytest.fixture(scope="module")
def weights():
    return initial_values(vision_shapes(VISION) | language_shapes(LANGUAGE), 1)


@pytest.fixture(scope="module")
def published(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("published")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "newest_checkpoint", lambda run: SimpleNamespace(tensors=lambda group: iter(weights.items())))
        publish_pair(folder / "run", VISION, LANGUAGE, folder / "tokenizer.json", folder / "pair")
    return folder / "pair"


@pytest.mark.parametrize(("folder", "kind", "prefix"), [("vision", SiglipVisionModel, "vision."),
                                                        ("language", AutoModelForCausalLM, "language.")])  # fmt: skip
def test_transformers_loads_the_published_weights(published, weights, folder, kind, prefix):
    """Every tensor of the run is there, rounded to bfloat16."""
    model, report = kind.from_pretrained(published / folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if name.startswith(prefix):
            assert torch.equal(theirs[name.removeprefix(prefix)].float(), torch.from_numpy(value).bfloat16().float()), name
    assert {tensor.dtype for tensor in load_file(published / folder / "model.safetensors").values()} == {torch.bfloat16}


def test_the_sums_name_the_file_that_changed(published, tmp_path):
    check_pair(published)
    assert list(read_sums(published)) == [
        "language/config.json", "language/model.safetensors", "language/tokenizer.json", "vision/config.json",
        "vision/model.safetensors",
    ]  # fmt: skip
    for change, message in (
        (lambda p: (p / "vision/model.safetensors").write_bytes(b"x"), "vision/model.safetensors: not the file of"),
        (lambda p: (p / "language/tokenizer.json").unlink(), "language/tokenizer.json: missing"),
        (lambda p: (p / "vision/other.bin").write_bytes(b"x"), "vision/other.bin: not listed in"),
        (lambda p: (p / "SHA256SUMS").write_text("no sums"), "SHA256SUMS: missing or damaged"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(published, copy)
        change(copy)
        with pytest.raises(ValueError, match=message):
            copy_pair(tmp_path / "out", copy)
    assert not (tmp_path / "out").exists()


def test_the_shipped_pair_fits_the_demo(tmp_path):
    copy_pair(tmp_path / "pretrained")
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert size < 5_000_000 and "scripts/demo.py pretrain" in (SHIPPED / CARD).read_text()
    for folder, shapes in (("vision", vision_shapes(VISION)), ("language", language_shapes(LANGUAGE))):
        tensors = load_file(tmp_path / "pretrained" / folder / "model.safetensors")
        assert sum(t.numel() for t in tensors.values()) == sum(int(np.prod(shape)) for shape in shapes.values())
    assert json.loads((SHIPPED / "language" / "config.json").read_text())["vocab_size"] == LANGUAGE.vocab
