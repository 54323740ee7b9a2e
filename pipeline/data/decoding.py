"""Image files as pixels: what transformers' ``load_image`` makes of them, pixel for pixel, or an error.

It turns an image as its EXIF orientation says, takes the first frame of several, and converts it to RGB: palettes are
looked up, transparency is left out. Where it would cut values off, as it does with more than 8 bits of grey, we
refuse.
"""

import io
import warnings

from PIL import Image, ImageOps

from pipeline.plumbing.errors import InputError


def decode_image(content: bytes, name: str, mode: str | None = None) -> Image.Image:
    """The image in the bytes of a file, mode RGB. ``name`` begins errors. ``mode``: Pillow's name of what the image is
    converted to before, as a column of a data set may say.

    Raises InputError for what Pillow cannot read whole, and for greys of more than 8 bits.
    """
    if not content:
        raise InputError(f"{name}: not a readable image: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data that say nothing of the orientation, large images
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            if image.mode.startswith(("I", "F")):
                raise InputError(
                    f"{name}: an image of mode {image.mode}, more than 8 bits of grey, which transformers would cut "
                    "off at 255 (all white); convert it to 8 bits"
                )
            return image.convert(mode or "RGB").convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise whatever their parsers do
        raise InputError(f"{name}: not a readable image: {error}") from None
