"""The check of leakage: copies of training images are found in held-out stores, and other images are not taken for copies."""
import io
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw

from granvit.data import leakage
from granvit.data.conversations import build_conversations
from granvit.data.leakage import NEAR, Leak, check_leakage, difference_hash, find_leaks, fingerprints
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.demo.scenes import scene
from tests.conftest import spoken, write_spoken


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def record(name: str, image: Image.Image, file_format: str = "PNG", **options) -> ImageRecord:
    data = encoded(image, file_format, **options)
    return ImageRecord(name, image.width, image.height, data, "a picture", (Region((0.1, 0.1, 0.5, 0.5), "a thing"),))


def picture(seed: int, side: int = 160) -> Image.Image:
    """A picture with structure at a scale that survives resizing: random colours on an 8 x 8 grid, smoothly interpolated."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)


def page(*lines: str, colour=(255, 255, 255)) -> Image.Image:
    """A blank page with a few small words: almost all neighbouring grey values are equal."""
    image = Image.new("RGB", (160, 160), colour)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((10, 10 + 20 * number), line, fill=(0, 0, 0))
    return image


def store(path, *records: ImageRecord):
    write_store(records, path)
    return str(path)


CHANGES = {
    "other format": lambda image: (image, {"file_format": "JPEG", "quality": 60}),
    "half the size": lambda image: (image.resize((80, 80)), {}),
    "brighter": lambda image: (image.point(lambda v: min(int(v * 1.2), 255)), {}),
    "grey": lambda image: (image.convert("L").convert("RGB"), {}),
    "a sticker": lambda image: (_with_sticker(image), {}),
}


def _with_sticker(image: Image.Image) -> Image.Image:
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle((20, 20, 50, 50), fill=(200, 30, 30))
    return changed


def test_equal_pixels_are_refused_in_whatever_file(tmp_path):
    """A blank page too: pixels are compared whatever the picture is."""
    trained = store(tmp_path / "trained", record("a", picture(1)), record("blank", page()))
    for number, image in enumerate((picture(1), page())):
        held_out = store(tmp_path / f"held{number}", record("b", picture(2)), record("copy", image, "BMP"))
        with pytest.raises(ValueError, match=f"held{number} shares 1 of its 2 images with .*trained.*copy equals (a|blank)"):
            check_leakage([trained], held_out)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_refused(tmp_path, change):
    trained = store(tmp_path / "trained", *(record(f"t{seed}", picture(seed)) for seed in range(6)))
    image, options = CHANGES[change](picture(4))
    held_out = store(tmp_path / "held", record("other", picture(99)), record("copy", image, **options))
    with pytest.raises(ValueError, match=r"shares 1 of its 2 images.*copy is nearly t4 \(\d+ of 256 bits differ\)"):
        check_leakage([trained], held_out)


def test_pages_with_other_words_and_plain_colours_are_no_copies(tmp_path):
    """Their difference hashes are equal or nearly so; the test is that this alarms nobody."""
    trained = [page("one", "two"), page(colour=(200, 200, 200)), page(colour=(10, 20, 30)), page("x")]
    held_out = [page("three", "four"), page(colour=(201, 200, 200)), page(), page("y")]
    bits = [[difference_hash(np.asarray(image))[0] for image in images] for images in (trained, held_out)]
    assert any(np.unpackbits((a ^ b).view(np.uint8)).sum() <= NEAR for a, b in product(*bits))
    paths = [
        store(tmp_path / name, *(record(f"{name}{i}", image) for i, image in enumerate(images)))
        for name, images in (("trained", trained), ("held", held_out))
    ]
    check_leakage(paths[:1], paths[1])


def test_scenes_of_the_demo_are_no_copies_of_each_other(tmp_path):
    paths = [store(tmp_path / split, *(scene(split, 0, index) for index in range(60))) for split in ("train", "heldout")]
    check_leakage(paths[:1], paths[1])
    states = fingerprints(Store(paths[0]))["state"]
    assert (states == leakage.STRUCTURED).mean() > 0.8  # most of them were compared by the difference hash


def test_the_search_misses_no_pair():
    """Against the distances of all pairs, among hashes at 0 to 60 bits from each other."""
    rng = np.random.default_rng(0)
    held_out, trained = np.zeros(40, leakage.FINGERPRINT), np.zeros(400, leakage.FINGERPRINT)
    for part in (held_out, trained):
        part["pixels"] = rng.integers(0, 2**63, (len(part), 2)).view("V16")[:, 0]
        part["state"] = leakage.STRUCTURED
    held_out["bits"] = rng.integers(0, 1 << 16, (40, 16))
    for index in range(len(trained)):
        bits = np.unpackbits(held_out["bits"][index % 40].view(np.uint8))
        bits[rng.permutation(256)[: rng.integers(0, 61)]] ^= 1
        trained["bits"][index] = np.packbits(bits).view("<u2")
    all_distances = np.array([
        [np.unpackbits((a ^ b).view(np.uint8)).sum() for b in trained["bits"]] for a in held_out["bits"]
    ])  # fmt: skip
    expected = {i: int(row.min()) for i, row in enumerate(all_distances) if row.min() <= NEAR}
    found = find_leaks(trained, held_out)
    assert {leak.held_out: leak.distance for leak in found} == expected and 20 < len(expected) <= 40
    assert all(all_distances[leak.held_out, leak.trained] == leak.distance for leak in found)
    assert find_leaks(trained, trained[:1]) == [Leak(0, 0, None)]


def test_fingerprints_are_kept_and_damaged_records_are_said(tmp_path, monkeypatch, caplog):
    broken = record("broken", picture(5))
    broken = ImageRecord(broken.id, broken.width, broken.height, b"not an image", None, broken.regions)
    trained, held_out = store(tmp_path / "trained", record("a", picture(1)), broken), store(tmp_path / "held", broken)
    good = store(tmp_path / "good", record("b", picture(2)))
    monkeypatch.setattr(leakage.log, "propagate", True)
    check_leakage([trained], good)
    assert "1 images cannot be decoded" in caplog.text
    monkeypatch.setattr(leakage, "_make", None)  # a second computation would fail
    check_leakage([trained], good)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"held: image 0 cannot be decoded"):
        check_leakage([trained], held_out)
    with pytest.raises(ValueError, match="good is also trained on"):
        check_leakage([trained, good], good)


def test_a_passed_check_is_kept_for_these_images_alone(tmp_path, monkeypatch):
    trained = store(tmp_path / "trained", record("a", picture(1)), record("b", picture(2)))
    held_out = store(tmp_path / "held", record("c", picture(3)))
    check_leakage([trained], held_out)
    searched = []
    monkeypatch.setattr(leakage, "find_leaks", lambda *found: searched.append(found) or find_leaks(*found))
    check_leakage([trained], held_out)
    assert not searched
    for path, seed in ((store(tmp_path / "more", record("d", picture(4))), 4), (trained, 1)):
        copied = store(tmp_path / f"held{seed}", record("c", picture(seed)))
        for _ in range(2):  # a failed check is not kept
            with pytest.raises(ValueError, match="c equals"):
                check_leakage([path], copied)
    assert len(searched) == 4


def test_conversations_without_an_image_have_nothing_to_compare(tmp_path):
    trees = [spoken("talk", "hello", "hello"), spoken("seen", "<image>\nwhat?", "a thing", image="seen.png")]
    build_conversations(*write_spoken(tmp_path, trees), tmp_path / "talks")
    assert sorted(fingerprints(Store(tmp_path / "talks"))["state"] > leakage.NO_IMAGE) == [False, True]
    image = Store(tmp_path / "talks").record(1).image or Store(tmp_path / "talks").record(0).image
    held_out = store(tmp_path / "held", record("copy", Image.open(io.BytesIO(image)).convert("RGB")))
    with pytest.raises(ValueError, match="copy equals seen"):
        check_leakage([str(tmp_path / "talks")], held_out)
