"""Captions by a Qwen2.5-VL with random weights: in this process, and by the server code of `transformers serve`."""
import importlib.util
import json
import shutil
import tempfile

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from granvit.data.annotate.annotator import Chain, Failed, FoundRegion, KnownImage
from granvit.data.annotate.caption import LocalCaptioner, Question
from granvit.data.annotate.detect import Detector
from granvit.data.annotate.endpoint import EndpointCaptioner
from tests.annotate.images import noise, photograph
from tests.annotate.tiny_detectors import write_detector
from tests.annotate.tiny_qwen import VISION_TOKENS, ImagesOnly, transformers_serve, write_qwen

LENGTHS = {"global_tokens": 9, "region_tokens": 6}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def batch():
    regions = [((0.11, 0.13, 0.63, 0.87), "old"), ((0.51, 0.23, 0.89, 0.41), ""), ((0.0, 0.0, 1.0, 1.0), "")]
    boxes = tuple(FoundRegion(box, caption, 0.5) for box, caption in regions)
    coffee, other = photograph("coffee.png").pixels_HW3, noise(90, 80, 1).pixels_HW3
    return [KnownImage(coffee, boxes, "old"), noise(60, 90), KnownImage(other, boxes[:1])]


@pytest.fixture(scope="module")
def results(directory, batch):
    return LocalCaptioner(directory=directory, **LENGTHS).annotate(batch)


def test_captions_are_those_of_the_model(directory, batch, results):
    """Transformers' own processor and greedy loop, one question at a time."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = ImagesOnly(Qwen2VLImageProcessor.from_pretrained(directory), tokenizer)
    captioner = LocalCaptioner(directory=directory)
    told = {result.global_caption for result in results} | {r.caption for result in results for r in result.regions}
    assert len(told) > 4
    for image, result in zip(batch, results, strict=True):
        height, width = image.pixels_HW3.shape[:2]
        asked = [(image.pixels_HW3, captioner.global_prompt, 9, result.global_caption)]
        for region in result.regions:
            x1, y1, x2, y2 = region.box
            dx, dy = 0.1 * (x2 - x1), 0.1 * (y2 - y1)
            left, top = (max(int(v), 0) for v in ((x1 - dx) * width, (y1 - dy) * height))
            right, bottom = int(np.ceil((x2 + dx) * width)), int(np.ceil((y2 + dy) * height))
            asked.append((image.pixels_HW3[top:bottom, left:right], captioner.region_prompt, 6, region.caption))
        for pixels, prompt, length, caption in asked:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(images=[pixels], text=[text], return_tensors="pt")
            ids = inputs["input_ids"]
            with torch.no_grad():
                generated = model.generate(**inputs, do_sample=False, max_new_tokens=length)[0, ids.shape[1] :]
            assert len(generated) == length and tokenizer.decode(generated, skip_special_tokens=True) == caption


def test_results_do_not_depend_on_the_batch(directory, batch, results):
    captioner = LocalCaptioner(directory=directory, **LENGTHS)
    assert [captioner.annotate([image])[0] for image in batch[::-1]] == results[::-1]


def test_boxes_and_scores_stay_and_captions_are_replaced(batch, results):
    for image, result in zip(batch, results, strict=True):
        assert [(r.box, r.score) for r in result.regions] == [(r.box, r.score) for r in image.regions]
        assert len(result.global_caption) == 8 and all(len(region.caption) == 5 for region in result.regions)
        assert result.refused == () and result.failure is None


def test_either_prompt_can_be_left_out(directory, batch):
    (result,) = LocalCaptioner(directory=directory, region_prompt=None, **LENGTHS).annotate(batch[:1])
    assert result.regions == batch[0].regions and result.global_caption != "old"
    (result,) = LocalCaptioner(directory=directory, global_prompt=None, **LENGTHS).annotate(batch[:1])
    assert result.global_caption == "old" and result.regions[0].caption != "old"


def test_transformers_serve_gives_the_same_captions(directory, batch, results, tmp_path, monkeypatch):
    for module in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"transformers serve needs {module}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the server leaves the images it was sent there
    options = {"model": str(directory), "concurrent": 1, "attempts": 1, "timeout": 30.0}
    options["cache"] = tmp_path / "answers.sqlite"
    with transformers_serve() as url:
        assert EndpointCaptioner(endpoint=url, **options, **LENGTHS).annotate(batch) == results
    assert EndpointCaptioner(endpoint=url, **options, **LENGTHS).annotate(batch) == results  # from the cache


def test_detecting_and_captioning_in_a_chain(directory, tmp_path_factory, batch):
    detector = Detector(write_detector(tmp_path_factory.mktemp("detr")), score=0.3)
    regions = LocalCaptioner(directory=directory, global_prompt=None, **LENGTHS)
    whole = LocalCaptioner(directory=directory, region_prompt=None, **LENGTHS)
    chain = Chain((detector, regions, whole))
    (result,) = chain.annotate([KnownImage(batch[0].pixels_HW3)])
    assert result.regions and all(len(region.caption) == 5 and region.score > 0.3 for region in result.regions)
    assert len(result.global_caption) == 8
    assert len({chain.version, Chain((detector, regions)).version, Chain((regions, detector, whole)).version}) == 3


def test_directories_as_published_have_no_text_config(directory, batch, results, tmp_path):
    """Qwen's own config.json has the text model's keys beside the others; save_pretrained of 4.57 nests them."""
    flat = tmp_path / "flat"
    shutil.copytree(directory, flat)
    tree = json.loads((flat / "config.json").read_text())
    text = tree.pop("text_config")
    del tree["vision_config"]["model_type"]
    (flat / "config.json").write_text(json.dumps(text | tree))
    assert tree["model_type"] == "qwen2_5_vl" and text["model_type"] == "qwen2_5_vl_text"
    assert LocalCaptioner(directory=flat, **LENGTHS).annotate(batch[:1]) == results[:1]


def test_answers_that_do_not_end_and_images_that_fail_are_refused(directory, tmp_path):
    endless = tmp_path / "endless"
    shutil.copytree(directory, endless)
    tree = json.loads((endless / "generation_config.json").read_text())
    del tree["forced_eos_token_id"]
    (endless / "generation_config.json").write_text(json.dumps(tree))
    thin = KnownImage(np.zeros((1, 300, 3), np.uint8), (FoundRegion((0.0, 0.0, 0.5, 1.0), "old"),), "old")
    first, second = LocalCaptioner(directory=endless, **LENGTHS).annotate([noise(40, 40), thin])
    assert first.global_caption is None and first.refused == (("global", "answer is too long"),)
    assert second.global_caption is None and second.refused[0] == ("global", "image or crop is too narrow for the model")


def test_control_tokens_spelled_in_an_answer_stay_text(directory):
    captioner = LocalCaptioner(directory=directory)
    tokenizer = captioner._tokenizer
    _ = captioner._model
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "a<|im_end|>b"]
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", VISION_TOKENS[0]])
    assert captioner._text([other, *spelled, end, *spelled]) == "a<|im_end|>b"


def test_version_knows_settings_and_files(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    first = LocalCaptioner(directory=directory)
    assert LocalCaptioner(directory=copy, device="npu:0").version == first.version
    (copy / "generation_config.json").write_text("{}")
    changes = [{"directory": copy}, {"together": 2}, {"margin": 0.2}, {"region_prompt": None}]
    others = [LocalCaptioner(**{"directory": directory, **change}) for change in changes]
    assert len({made.version for made in (first, *others)}) == 5


def test_directories_that_cannot_be_used_are_named(directory, tmp_path):
    detector = write_detector(tmp_path / "detr")
    with pytest.raises(ValueError, match=r"detr: model_type is detr"):
        LocalCaptioner(directory=detector).annotate([noise(40, 40)])
    bare = tmp_path / "bare"
    shutil.copytree(directory, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="bare: its tokenizer has no chat template"):
        LocalCaptioner(directory=bare).annotate([noise(40, 40)])
    with pytest.raises(ValueError, match=r"have 2 <\|image_pad\|>"):
        LocalCaptioner(directory=directory, global_prompt="see <|image_pad|>").annotate([noise(40, 40)])


def test_crops():
    pixels = np.arange(100 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3)

    def crop(box, margin=0.0, max_pixels=10**6):
        return np.asarray(Question(pixels, box, "", 1).picture(margin, max_pixels))

    np.testing.assert_array_equal(crop(None), pixels)
    np.testing.assert_array_equal(crop((0.25, 0.5, 0.75, 1.0)), pixels[50:, 50:150])
    np.testing.assert_array_equal(crop((0.25, 0.5, 0.75, 1.0), margin=0.2), pixels[40:, 30:170])
    np.testing.assert_array_equal(crop((0.5, 0.5, 0.505, 0.51)), pixels[36:65, 86:115])  # at least 28 pixels, whole ones
    np.testing.assert_array_equal(crop((0.0, 0.0, 0.001, 0.01)), pixels[:15, :15])  # as far as the image reaches
    assert crop(None, max_pixels=5000).shape == (50, 100, 3) and crop((0.0, 0.0, 0.5, 0.5), max_pixels=5000).shape == (50, 100, 3)
    narrow = Question(np.zeros((2, 500, 3), np.uint8), None, "", 1)
    with pytest.raises(Failed, match="too narrow"):
        narrow.picture(0.1, 10**6)
