"""An image is what transformers and ``datasets`` make of the same bytes, pixel for pixel, or it is refused."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from pipeline.data.decoding import decode_image
from pipeline.plumbing.errors import InputError

RGB = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
ALPHA = np.linspace(0, 255, 24 * 16).astype(np.uint8).reshape(24, 16)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(RGB), kind, exif=exif)


def palette(**options: Any) -> bytes:
    return encoded(Image.fromarray(RGB).quantize(9), "PNG", **options)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(RGB).convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    return image


def several(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


IMAGES: dict[str, bytes] = {
    **{f"EXIF orientation {number}": turned(number) for number in range(10)},
    "EXIF in PNG": turned(6, "PNG"),
    "EXIF in WebP": turned(8, "WEBP"),
    "EXIF in TIFF": turned(6, "TIFF"),
    "RGB": encoded(Image.fromarray(RGB), "PNG"),
    "RGBA": encoded(with_alpha("RGB"), "PNG"),
    "RGBA in WebP": encoded(with_alpha("RGB"), "WEBP", lossless=True),
    "L": encoded(Image.fromarray(ALPHA), "PNG"),
    "LA": encoded(with_alpha("L"), "PNG"),
    "1 bit": encoded(Image.fromarray(ALPHA > 99), "PNG"),
    "1 bit in TIFF": encoded(Image.fromarray(ALPHA > 99), "TIFF"),
    "palette": palette(),
    "palette, one transparent": palette(transparency=3),
    "palette, transparency of each": palette(transparency=bytes(range(0, 180, 20))),
    "grey, one transparent": encoded(Image.fromarray(ALPHA), "PNG", transparency=8),
    "CMYK": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "CMYK in TIFF": encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "YCbCr in TIFF": encoded(Image.fromarray(RGB).convert("YCbCr"), "TIFF"),
    "gamma": encoded(Image.fromarray(RGB), "PNG", icc_profile=b"not one"),
    "GIF of two frames": several("GIF"),
    "WebP of two frames": several("WEBP", lossless=True),
    "TIFF of two pages": several("TIFF"),
    "APNG": several("PNG"),
    "MPO": several("MPO"),
    "PPM of 16 bits": b"P6 2 1 65535\n" + bytes(range(12)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    content = IMAGES[name]
    (tmp_path / "image").write_bytes(content)
    found = np.asarray(decode_image(content, "image"))
    assert np.array_equal(found, np.asarray(load_image(str(tmp_path / "image"))))
    by_datasets = datasets.Image().decode_example({"path": None, "bytes": content})
    assert np.array_equal(found, np.asarray(load_image(by_datasets)))


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
    ],
)
def test_images_are_turned(orientation: int, expected: np.ndarray) -> None:
    assert np.array_equal(np.asarray(decode_image(turned(orientation, "PNG"), "image")), expected)


def test_a_column_may_say_a_mode() -> None:
    content = encoded(Image.fromarray(RGB), "PNG")
    by_datasets = datasets.Image(mode="L").decode_example({"path": None, "bytes": content})
    assert np.array_equal(np.asarray(decode_image(content, "image", "L")), np.asarray(load_image(by_datasets)))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)]
)
def test_more_than_8_bits_of_grey_are_refused(kind: str, dtype: type) -> None:
    """Transformers makes all of it white that is above 255."""
    content = encoded(Image.fromarray(ALPHA.astype(dtype) * 257), kind)
    with pytest.raises(InputError, match=r"a/scan: an image of mode (I|F).*convert it to 8 bits"):
        decode_image(content, "a/scan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", "cat.jpg: not a readable image: the file is empty"),
        (lambda content: content[: len(content) // 2], "cat.jpg: not a readable image: "),
        (lambda content: b"<html>not found</html>", "cat.jpg: not a readable image: cannot identify"),
        (lambda content: b"\0" * len(content), "cat.jpg: not a readable image: "),
        (lambda content: b"GIF89a" + bytes(3), "cat.jpg: not a readable image: "),
    ],
)
def test_damaged_images_are_named(spoil: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_image(spoil(IMAGES["CMYK"]), "cat.jpg")


def test_no_damage_escapes() -> None:
    """Every byte of some small files overwritten: decoded or refused, nothing else."""
    for name in ("palette, one transparent", "GIF of two frames", "EXIF in TIFF", "PPM of 16 bits"):
        content = IMAGES[name]
        for place in range(0, min(len(content), 300), 2):
            damaged = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
            with contextlib.suppress(InputError):
                assert decode_image(damaged, name).mode == "RGB"
