"""A detector of transformers with random weights, written to disk."""
import json
import shutil

import pytest

pytest.importorskip("torch")
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from granvit.data.annotate.annotator import FoundRegion, KnownImage, Result
from granvit.data.annotate.detect import Detector
from tests.annotate.images import noise, photograph
from tests.annotate.tiny_detectors import LABELS, write_detector


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("detr"))


@pytest.fixture(scope="module")
def batch():
    return [noise(60, 40), photograph("coffee.png"), noise(40, 90, 1)]


def test_boxes_are_those_of_the_model(directory, batch):
    results = Detector(directory, score=0.3, label_captions=True).annotate(batch)
    assert sum(len(result.regions) for result in results) > 5
    model = AutoModelForObjectDetection.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory, use_fast=False)
    for image, result in zip(batch, results, strict=True):
        with torch.no_grad():
            outputs = model(**processor(images=image.pixels_HW3, return_tensors="pt"))
        found = processor.post_process_object_detection(outputs, threshold=0.3)[0]  # relative: no sizes given
        kept = []
        for score, label, box in zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True):
            x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
            if x1 < x2 and y1 < y2:
                kept.append((score, LABELS[label], (x1, y1, x2, y2)))
        kept.sort(key=lambda region: -region[0])
        assert [region.caption for region in result.regions] == [caption for _, caption, _ in kept]
        for region, (score, _, box) in zip(result.regions, kept, strict=True):
            assert region.score == score and region.box == pytest.approx(box, abs=1e-5)


def test_results_do_not_depend_on_the_batch(directory, batch):
    together = Detector(directory, score=0.3).annotate(batch)
    assert [Detector(directory, score=0.3).annotate([image])[0] for image in batch] == together
    assert all(region.caption == "" for result in together for region in result.regions)


def test_images_with_regions_are_not_searched(directory):
    known = (FoundRegion((0.1, 0.1, 0.4, 0.4), "a cup"),)
    image = KnownImage(noise(60, 40).pixels_HW3, known, "a table")
    assert Detector(directory, score=0.3).annotate([image]) == [Result(known, "a table")]


def test_an_image_that_fails_does_not_fail_its_batch(directory, monkeypatch):
    detector = Detector(directory, score=0.3)
    model = detector._model
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory by 3 bytes")
        return model.forward(*args, **kwargs)

    forward.config, forward.device = model.config, model.device
    monkeypatch.setitem(detector.__dict__, "_model", forward)
    first, second = detector.annotate([noise(60, 40), noise(60, 40)])
    assert first == Result(failure="detection failed (RuntimeError)")
    assert second.failure is None and second.regions


def test_version_knows_settings_and_files(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "README.md").write_text("not read")
    detector = Detector(directory)
    assert Detector(copy).version == detector.version == Detector(copy, device="cuda:0").version
    assert len({detector.version, Detector(directory, score=0.4).version, Detector(directory, label_captions=True).version}) == 3
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert Detector(copy).version != detector.version


def test_directories_that_are_no_model_are_named(directory, tmp_path):
    with pytest.raises(ValueError, match=r"no/such: has no config\.json"):
        Detector(tmp_path / "no/such").annotate([noise(40, 40)])
    pickled = tmp_path / "pickled"
    shutil.copytree(directory, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    for use in (lambda: Detector(pickled).version, lambda: Detector(pickled).annotate([noise(40, 40)])):
        with pytest.raises(ValueError, match=r"pickled: has no \.safetensors file"):
            use()
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="damaged"):
        Detector(damaged).annotate([noise(40, 40)])
    with pytest.raises(ValueError, match="device nonsense"):
        Detector(directory, device="nonsense").annotate([noise(40, 40)])


def test_code_in_a_directory_is_not_run(directory, tmp_path):
    remote = tmp_path / "remote"
    shutil.copytree(directory, remote)
    tree = json.loads((remote / "config.json").read_text())
    tree |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForObjectDetection": "mine.Model"}}
    (remote / "config.json").write_text(json.dumps(tree))
    (remote / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="remote"):
        Detector(remote).annotate([noise(40, 40)])
    assert not (tmp_path / "ran").exists()
