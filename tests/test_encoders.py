"""Every encoder row from its publisher's files, in both packages, against transformers' own model with the same weights."""
import json

import numpy as np
import pytest

from granvit.checkpoint.convert import convert
from granvit.config import vision_config
from granvit.models import VisionConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
ms = pytest.importorskip("mindspore")
from safetensors.torch import load_file, save_file  # noqa: E402 (these need torch)

import ms_granvit  # noqa: E402
import pt_granvit  # noqa: E402
from tests import transformers_encoders as encoders  # noqa: E402

PACKAGES = pytest.mark.parametrize("package", [pt_granvit, ms_granvit], ids=["torch", "mindspore"])


def tiny(row: str) -> VisionConfig:
    """A row's structure at the smallest useful size; where its patches do not fill the image, neither do these."""
    full = vision_config(row)
    image_size = 32 + full.image_size - full.covered_pixels
    return full.model_copy(
        update={"image_size": image_size, "patch_size": 8, "width": 24, "layers": 3, "heads": 2, "mlp": 48}
    )


def normalised(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)


def features(encoder, pixels: np.ndarray, **level: str) -> np.ndarray:
    if isinstance(encoder, ms_granvit.VisionEncoder):
        ms.set_context(mode=ms.GRAPH_MODE)
        return encoder(ms.Tensor(pixels), **level).asnumpy()
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels), **level).numpy()


@pytest.fixture(scope="module", params=encoders.ROWS)
def published(request, tmp_path_factory):
    """A row's structure, transformers' model of it, and its directory as published."""
    vision, directory = tiny(request.param), tmp_path_factory.mktemp(request.param)
    model = encoders.peer(vision)
    encoders.publish(model, directory, encoders.HUB.get(request.param))
    return vision, model, directory


@PACKAGES
def test_features_of_every_level_are_those_of_transformers(published, package):
    vision, model, directory = published
    pixels = normalised(vision.image_size)
    encoder = package.load_encoder(directory, device="cpu")
    expected = encoders.levels(model, vision, torch.from_numpy(pixels))
    assert set(expected) == {"penultimate", "last"} | ({"final"} if vision.closing_norm else set())
    levels = expected if package is pt_granvit else {next(iter(expected)), next(reversed(expected))}  # each is compiled there
    for level in levels:
        theirs = expected[level]
        assert theirs.shape == (2, 16, 24)
        np.testing.assert_allclose(features(encoder, pixels, level=level), theirs.numpy(), rtol=1e-4, atol=2e-5, err_msg=level)
    if package is pt_granvit:
        np.testing.assert_array_equal(features(encoder, pixels), features(encoder, pixels, level="penultimate"))
    if not vision.closing_norm:
        with pytest.raises(ValueError, match=r"'final'.*penultimate, last"):
            features(encoder, pixels, level="final")


@PACKAGES
@pytest.mark.parametrize("row", ["clip-vit-large-patch14-336", "siglip2-so400m-patch16-512", "internvit-300m-448"])
def test_another_resolution_resamples_the_positions_as_transformers_does(row, package, tmp_path):
    vision = tiny(row)
    model = encoders.peer(vision)
    encoders.publish(model, tmp_path)
    pixels = normalised(48)
    options = {} if row.startswith("internvit") else {"interpolate_pos_encoding": True}
    expected = encoders.levels(model, vision, torch.from_numpy(pixels), **options)["penultimate"]
    encoder = package.load_encoder(tmp_path, resolution=48, device="cpu")
    np.testing.assert_allclose(features(encoder, pixels), expected.numpy(), rtol=1e-4, atol=2e-5)
    for other in (pixels[..., :32], pixels[..., :32, :32], np.concatenate([pixels, pixels], -1)):
        with pytest.raises(ValueError, match=r"\[B, 3, 48, 48\].*load_encoder"):
            features(encoder, other)
    with pytest.raises(ValueError, match=r"resolution 7\b.*\b8\b"):
        package.load_encoder(tmp_path, resolution=7)


def test_what_the_encoder_is_comes_from_its_files(published):
    vision, _, directory = published
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": vision.mean, "image_std": vision.std, "resample": {"bilinear": 2, "bicubic": 3}[vision.resize]})
    )
    found = pt_granvit.load_encoder(directory, device="cpu").config
    (directory / "preprocessor_config.json").unlink()
    assert found.model_dump(exclude={"name", "built_level"}) == vision.model_dump(exclude={"name", "built_level"})


def test_what_is_left_out_is_said(tmp_path, caplog):
    vision = tiny("siglip2-so400m-patch16-512")
    encoders.publish(encoders.peer(vision), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vision_model.head.probe": torch.ones(1, 1, 24)}, tmp_path / "model.safetensors")
    with caplog.at_level("WARNING", logger="granvit"):
        pt_granvit.load_encoder(tmp_path, device="cpu")
    assert [record.message for record in caplog.records if "not used here" not in record.message] == [
        f"{tmp_path}: left out vision_model.head.probe: the pooling head: the projector reads patch tokens"
    ]


@PACKAGES
def test_a_loaded_encoder_says_which_kernels_it_runs(package, tmp_path, caplog):
    encoders.publish(encoders.peer(tiny("siglip2-so400m-patch16-512")), tmp_path)
    with caplog.at_level("INFO", logger="granvit"):
        package.load_encoder(tmp_path, device="cpu")
    (line,) = [record.message for record in caplog.records if record.message.startswith("kernels: ")]
    assert "attention: " in line and "gelu: " in line


@PACKAGES
def test_bfloat16_is_kept_where_the_device_computes_in_it(package, tmp_path):
    vision = tiny("siglip2-so400m-patch16-512")
    encoders.publish(encoders.peer(vision).bfloat16(), tmp_path)
    encoder = package.load_encoder(tmp_path, device="cpu")
    assert encoder.dtype == (torch.bfloat16 if package is pt_granvit else ms.float32)  # MindSpore on CPU has no bfloat16
    if package is pt_granvit:
        assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
        wide = package.load_encoder(tmp_path, dtype=torch.float32, device="cpu")
        assert {p.dtype for p in wide.parameters()} == {torch.float32}


@PACKAGES
def test_an_encoder_comes_back_from_its_own_directory_in_either_package(package, tmp_path):
    vision = tiny("sailvit-huge-448")
    encoders.publish(encoders.peer(vision), tmp_path / "published", "apple")
    encoder = package.load_encoder(tmp_path / "published", device="cpu")
    encoder.save_pretrained(tmp_path / "saved")
    pixels = normalised(vision.image_size)
    for other in (pt_granvit, ms_granvit):
        found = features(other.load_encoder(tmp_path / "saved", device="cpu"), pixels)
        np.testing.assert_allclose(found, features(encoder, pixels), rtol=1e-4, atol=2e-5)


CONVERTED = {"aimv2-huge-patch14-448": ("aimv2", "aimv2"), "sailvit-huge-448": ("aimv2-apple", "aimv2"),
             "internvit-300m-448": ("internvit-hub", "internvit")}  # row -> its own layout, transformers' layout


@pytest.mark.parametrize("row", CONVERTED)
def test_a_conversion_there_and_back_keeps_every_byte(row, tmp_path):
    encoders.publish(encoders.peer(tiny(row)).bfloat16(), tmp_path / "published", encoders.HUB.get(row))
    convert(tmp_path / "published", tmp_path / "default", "default")
    convert(tmp_path / "default", tmp_path / "back", CONVERTED[row][0])
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "back"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    trees = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "back")]
    assert trees[0].items() <= trees[1].items()


@pytest.mark.parametrize("row", ["sailvit-huge-448", "internvit-300m-448"])
def test_transformers_loads_what_a_hub_layout_is_converted_to(row, tmp_path):
    vision = tiny(row)
    model = encoders.peer(vision)
    encoders.publish(model, tmp_path / "published", encoders.HUB[row])
    convert(tmp_path / "published", tmp_path / "converted", CONVERTED[row][1])
    loaded, said = type(model).from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def edit(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "row, change, message",
    [
        ("sailvit-huge-448", lambda t: t.pop("trunk.blocks.1.attn.qkv.weight"),
         r"trunk\.blocks\.1\.attn\.qkv\.weight"),
        ("sailvit-huge-448", lambda t: t.update({"trunk.blocks.1.attn.qkv.weight": torch.ones(71, 24)}),
         r"model\.safetensors.*'trunk\.blocks\.1\.attn\.qkv\.weight'.*\[71, 24\].*\b3\b"),
        ("sailvit-huge-448", lambda t: t.update({"preprocessor.pos_embed": torch.ones(16, 24)}),
         r"model\.safetensors.*'preprocessor\.pos_embed'.*\[16, 24\]"),
        ("internvit-300m-448", lambda t: t.update({"encoder.layers.0.attn.q_norm.weight": torch.ones(24)}),
         r"'encoder\.layers\.0\.attn\.q_norm\.weight'.*'internvit-hub'"),
        ("aimv2-huge-patch14-448", lambda t: t.update({"rms_norm.weight": torch.ones(23)}),
         r"rms_norm\.weight.*\[23\].*\[24\]"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_its_own_names(row, change, message, tmp_path):
    encoders.publish(encoders.peer(tiny(row)), tmp_path, encoders.HUB.get(row))
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        pt_granvit.load_encoder(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "row, key, value, message",
    [("internvit-300m-448", "qk_normalization", True, "qk_normalization True"),
     ("internvit-300m-448", "norm_type", "rms_norm", "norm_type 'rms_norm'"),
     ("sailvit-huge-448", "use_bias", True, "use_bias True"),
     ("siglip2-so400m-patch16-512", "hidden_act", "relu", "hidden_act 'relu'"),
     ("clip-vit-large-patch14-336", "model_type", "unheard-of", "model_type 'unheard-of'")],
)  # fmt: skip
def test_a_structure_that_no_encoder_here_has_is_refused_by_its_key(row, key, value, message, tmp_path):
    encoders.publish(encoders.peer(tiny(row)), tmp_path, encoders.HUB.get(row))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        pt_granvit.load_encoder(tmp_path, device="cpu")
