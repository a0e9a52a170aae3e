"""Geometry against painted pixels, and files that are not images."""
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from granvit.data.images import box_from_square, box_to_square, crop, decode, padding, to_square
from granvit.models import VisionConfig
from tests.conftest import encoded_image

BIG = 10**6


@pytest.mark.parametrize("width, height", [(200, 200), (301, 120), (120, 301), (64, 97)])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_a_painted_box_lands_where_the_geometry_says(vision, width, height, resize):
    """Paint the box white on black, pad and resize the picture, and measure where the white went."""
    vision = VisionConfig(**{**vision.model_dump(), "image_size": 128, "resize": resize, "mean": (0.0, 0.0, 0.0)})
    x1, y1, x2, y2 = width // 5, height // 4, width - width // 3, height - height // 8
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y1:y2, x1:x2] = 255
    seen = to_square(picture, vision)[0] / 255
    box = (x1 / width, y1 / height, x2 / width, y2 / height)
    expected = np.array(box_to_square(box, width, height)) * 128
    columns, rows = seen.max(0), seen.max(1)
    # Antialiased edges keep their area: white before the middle and after it give the two edges.
    middle_x, middle_y = int(expected[[0, 2]].mean()), int(expected[[1, 3]].mean())
    measured = np.array(
        [
            middle_x - columns[:middle_x].sum(),
            middle_y - rows[:middle_y].sum(),
            middle_x + columns[middle_x:].sum(),
            middle_y + rows[middle_y:].sum(),
        ]
    )
    np.testing.assert_allclose(measured, expected, atol=0.15)
    np.testing.assert_allclose(box_from_square(box_to_square(box, width, height), width, height), box, atol=1e-12)


def test_padding_has_the_encoders_mean_colour(vision):
    vision = VisionConfig(**{**vision.model_dump(), "image_size": 40, "mean": (0.5, 0.25, 1.0)})
    square = to_square(np.zeros((20, 40, 3), np.uint8), vision)
    assert square.shape == (3, 40, 40) and square.dtype == np.uint8
    assert (square[:, :10].transpose(1, 2, 0) == (127, 63, 255)).all()
    assert (square[:, 10:30] == 0).all()


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [7, 97, 512])
def test_a_square_is_the_padded_image_resized_at_once(vision, side, resize):
    """Bit for bit, with one strip of rows and with several, enlarged, reduced and kept."""
    vision = vision.model_copy(update={"image_size": side, "resize": resize, "mean": (0.5, 0.25, 1.0)})
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    sizes = [(1, 1), (7, 5), (97, 97), (97, 30), (1, 300), (301, 2), (256, 255), (255, 256), (512, 511), (333, 512), (513, 40),
             (640, 427), (70, 1025), (1500, 701), (701, 1500), (3000, 3)]  # fmt: skip
    for number, (width, height) in enumerate(sizes):
        picture = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
        whole, pad_x, pad_y = padding(width, height)
        square = Image.new("RGB", (whole, whole), (127, 63, 255))
        square.paste(Image.fromarray(picture), (pad_x, pad_y))
        expected = np.asarray(square.resize((side, side), filters[resize])).transpose(2, 0, 1)
        np.testing.assert_array_equal(to_square(picture, vision), expected, str((width, height)))


@pytest.mark.parametrize("size", [(40_000, 50), (50, 40_000)])
def test_the_square_of_a_long_image_is_never_made(vision, size, monkeypatch):
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *colour: made.append(size) or new(mode, size, *colour))
    width, height = size
    assert to_square(np.zeros((height, width, 3), np.uint8), vision).shape == (3, 32, 32)
    assert max(w * h for w, h in made) <= 40_000 * 256


def test_a_crop_is_the_box_of_the_original():
    """Each quadrant of one colour; crops of whole quadrants hold one colour, a scaled crop reaches beyond."""
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[30:, 50:] = (200, 100, 50)
    quadrant = crop(picture, (0.5, 0.5, 1.0, 1.0), 1.0, 8, "bilinear")
    assert quadrant.shape == (3, 8, 8)
    assert (quadrant.transpose(1, 2, 0) == (200, 100, 50)).all()
    assert (crop(picture, (0.0, 0.5, 0.5, 1.0), 1.0, 8, "bicubic") == 0).all()
    enlarged = crop(picture, (0.5, 0.5, 1.0, 1.0), 1.5, 8, "bilinear")  # clipped at the right and below, a third new
    assert (enlarged[0] > 100).mean() == pytest.approx((4 / 5) ** 2, abs=0.15)
    assert (enlarged[0, 0] < 100).all()


def test_a_crop_honours_parts_of_pixels():
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 50, 0).repeat(3, 2)
    strip = crop(ramp, (0.2025, 0.1, 0.2075, 0.9), 1.0, 4, "bilinear")  # half a pixel wide
    assert np.ptp(strip.astype(int)) <= 1 and abs(int(strip[0, 0, 0]) - 20) <= 1


def test_orientation_is_applied():
    picture = Image.fromarray(np.tile(np.array([[255, 0]], np.uint8), (30, 10))[:, :20])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), BIG).shape == (20, 30, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_common_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (10, 200, 30)).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(buffer.getvalue(), BIG).shape == (7, 9, 3)


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # a format that would run a program
        (encoded_image(40, 40)[:600], "truncated"),
        (encoded_image(40, 40, file_format="JPEG")[:1200], "truncated"),
        (encoded_image(40, 40)[:20], "not an image"),
        (encoded_image(1001, 1000), "max_pixels"),
        (sixteen_bits(), "8 bits"),
    ],
)
def test_what_is_no_usable_image(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode(data, BIG)


def test_a_decompression_bomb_is_refused_by_its_header():
    """The header states 2**31 pixels, the body has none: decoding it would fail with another error."""
    data = bytearray(encoded_image(8, 8))
    data[16:24] = (65535).to_bytes(4, "big") + (32768).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="max_pixels"):
        decode(bytes(data), BIG)
