"""Drawing boxes on images."""
import numpy as np
from PIL import Image, ImageDraw

from granvit.data.prompts import Box


def draw_boxes(image_HW3: np.ndarray, boxes: dict[str, Box | None]) -> Image.Image:
    """A Pillow image of `image_HW3` (uint8) with outlines of `boxes`: colour -> xyxy box relative to the image size, or None."""
    picture = Image.fromarray(image_HW3)
    draw, line = ImageDraw.Draw(picture), max(2, min(picture.size) // 150)
    for colour, box in boxes.items():
        if box is not None:
            corners = np.array(box) * np.tile(picture.size, 2)
            draw.rectangle(corners.round().astype(int).tolist(), outline=colour, width=line)
    return picture
