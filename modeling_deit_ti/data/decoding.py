"""Decodes an image, from a file or a table, to upright RGB."""

import io

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps


# More elongated images are refused: resized to the model's input, their long side would fill the memory.
MAX_ASPECT_RATIO = 200


def decode_image(encoded: dict) -> PILImage.Image:
    """An RGB image, upright, from `datasets`' encoded form: a dict with `bytes` or `path`."""
    if encoded is None:
        raise ValueError("it is missing")
    with open_image(encoded) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(
                f"it is {image.width}x{image.height} pixels, one side more than {MAX_ASPECT_RATIO} times the other"
            )
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Converts grey, palette, RGBA, CMYK, 16-bit and float images to 8-bit RGB. Scales 16 bits; PIL would clip."""
    if image.mode.startswith("I"):
        image = PILImage.fromarray(np.uint8(np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255)))
    elif image.mode == "F":
        values = np.asarray(image)
        image = PILImage.fromarray(np.uint8(np.clip(values * (255 if values.max(initial=0) <= 1 else 1), 0, 255)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def open_image(encoded: dict) -> PILImage.Image:
    """Opens an image: reads its header, but not yet its pixels."""
    return PILImage.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])


def read_image(row: dict) -> PILImage.Image:
    """The RGB image in a row of one of [`ImageData`]'s splits."""
    if "pixels" in row:
        return PILImage.frombuffer("RGB", (row["width"], row["height"]), row["pixels"], "raw", "RGB", 0, 1)
    return to_rgb(row["image"])
