"""Encoded pictures to pixels: one decoder for preparing, training, embedding and search.

What it gives is always upright (EXIF), RGB, with transparency on a background, 16 bit scaled, and
the first frame of an animation. What it refuses has a stable code. Limits are checked on the
header, before anything is decoded.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from tritower.datamodules.bad_value import BadValue, excerpt

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
"""Pillow's names of what is opened (an MPO is a JPEG).

Other readers are not worth the risk on strangers' bytes.
"""

WHITE = (255, 255, 255)

# Our limits are stricter, raise instead of warn, and name the picture; damaged EXIF means nothing
# about pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class Limits(NamedTuple):
    """What a picture may cost.

    Attributes:
        max_bytes: of the encoded picture.
        max_pixels: width x height, from the header.
        min_side: in pixels; smaller ones are tracking pixels.
        max_aspect: longer / shorter side; resizing a thin strip to a square input would need
            enormous memory.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    min_side: int = 2
    max_aspect: float = 100.0


LIMITS = Limits()


class ImageError(BadValue):
    """A picture that cannot be used, with the reason as `code`, e.g. `TRUNCATED_IMAGE`."""


def decode(
    data: bytes,
    *,
    max_side: int | None = None,
    draft: int | None = None,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = LIMITS,
) -> Image.Image:
    """An encoded picture as upright RGB pixels.

    Args:
        data: JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF.
        max_side: shrink so that the longer side is at most this; never enlarges.
        draft: sides of so many pixels are enough: a larger JPEG is decoded at a half, a quarter or
            an eighth.
        background: RGB behind transparent pixels.
        limits: what is refused before decoding.

    Raises:
        ImageError: EMPTY_FILE, FILE_TOO_LARGE, NOT_AN_IMAGE, IMAGE_TOO_LARGE, IMAGE_TOO_SMALL,
            IMAGE_SHAPE, TRUNCATED_IMAGE, DAMAGED_IMAGE or UNSUPPORTED_MODE.
    """
    return _render(_open(data, limits), max_side, background, draft)


def downsize(
    data: bytes,
    max_side: int = 256,
    *,
    quality: int = 90,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = LIMITS,
) -> bytes:
    """A picture as `prepare` stores it: a JPEG whose longer side is at most `max_side`.

    An upright RGB or gray JPEG that fits already is returned as it is. Search does the same to a
    user's photo, so that queries and products are seen through the same glass.

    Raises:
        ImageError: see `decode`.
    """
    image = _open(data, limits)
    fits = (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and max(image.size) <= max_side
        and len(data)
        <= 4 * image.width * image.height + 8192  # more than pixels need: a heap of metadata
    )
    pixels = _render(image, max_side, background)
    if fits and _orientation(image) == 1:
        return data
    buffer = io.BytesIO()
    # 4:4:4: small colored details survive. Pillow would copy the comment, which may be longer than
    # the picture.
    pixels.save(buffer, "JPEG", quality=quality, subsampling=0, comment=b"")
    return buffer.getvalue()


def _open(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    """Read the header and refuse what is too much; no pixel is decoded."""
    if not data:
        raise ImageError("EMPTY_FILE", "the picture has 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(
            "FILE_TOO_LARGE", f"{len(data):,} bytes; at most {limits.max_bytes:,} are read"
        )
    # The header decides: format and size are checked before anything is decoded.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError("IMAGE_TOO_LARGE", f"more than {limits.max_pixels:,} pixels") from None
    except Exception as error:  # Pillow's readers raise many kinds of exceptions on damaged headers
        if _known_start(data):
            raise _damaged(error, data) from None
        start = excerpt(data[:24].decode("latin-1"))
        raise ImageError(
            "NOT_AN_IMAGE", f"no JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF; it starts with {start}"
        ) from None
    _check_size(*image.size, limits)
    return image


def _check_size(width: int, height: int, limits: Limits) -> None:
    size = f"{width:,} x {height:,} pixels"
    # Limits on the area, on the shorter side, and on the shape.
    if width * height > limits.max_pixels:
        raise ImageError(
            "IMAGE_TOO_LARGE", f"{size}; at most {limits.max_pixels:,} in all are decoded"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(
            "IMAGE_TOO_SMALL", f"{size}; both sides must be at least {limits.min_side}"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(
            "IMAGE_SHAPE", f"{size}; one side may be at most {limits.max_aspect:g} times the other"
        )


def _render(
    image: ImageFile.ImageFile,
    max_side: int | None,
    background: tuple[int, int, int],
    draft: int | None = None,
) -> Image.Image:
    """Decode, turn upright, flatten, shrink."""
    enough = draft if max_side is None else 2 * max_side
    if enough is not None and image.format in ("JPEG", "MPO"):
        # JPEG can shrink by 2, 4 or 8 while it decodes.
        image.draft("RGB", (enough, enough))
    _load(image)
    upright: Image.Image = image
    if _orientation(image) != 1:
        upright = ImageOps.exif_transpose(image)
    pixels = _to_rgb(upright, background)
    if max_side is None or max(pixels.size) <= max_side:
        return pixels
    # Sides are rounded up: what is stored must pass the limits on shape again.
    scale = max_side / max(pixels.size)
    width, height = (max(LIMITS.min_side, math.ceil(side * scale - 1e-9)) for side in pixels.size)
    return pixels.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _load(image: ImageFile.ImageFile) -> None:
    """Decode all pixels of the first frame, or raise: half a picture is none."""
    stream = image.fp
    try:
        image.load()
        # Checks every chunk; loading stops at the last row.
        if image.format == "PNG" and isinstance(stream, io.BytesIO):
            Image.open(io.BytesIO(stream.getbuffer()), formats=("PNG",)).verify()
    except (
        Exception
    ) as error:  # Pillow's decoders raise many kinds of exceptions on damaged pictures
        raise _damaged(error) from None


def _damaged(error: Exception, data: bytes = b"") -> ImageError:
    if "truncated" in str(error).lower() or isinstance(error, EOFError) or _is_cut(data):
        return ImageError("TRUNCATED_IMAGE", "the picture is cut off: its end is missing")
    return ImageError("DAMAGED_IMAGE", f"the picture cannot be decoded: {excerpt(error)}")


def _is_cut(data: bytes) -> bool:
    """Whether a WebP or AVIF ends before the length that it declares."""
    if data[:4] == b"RIFF":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    position = 0
    while data[4:8] == b"ftyp" and position + 8 <= len(data):  # boxes: length, type, content
        length = int.from_bytes(data[position : position + 4], "big")
        if length < 8:  # to the end of the file, or longer than 4 GiB
            return length == 1
        position += length
    return position > len(data)


def _known_start(data: bytes) -> bool:
    # JPEG, PNG, GIF, BMP and TIFF begin so; WebP and AVIF name themselves after a length.
    starts = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF87a",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
    )
    return (
        data.startswith(starts)
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[4:12] == b"ftypavif"
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it cannot be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF means nothing about the pixels
        return 1
    if isinstance(value, int) and 1 <= value <= 8:
        return value
    return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    # 16-bit pixels are scaled, transparency is laid on the background.
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        flat = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(flat, layer).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode not in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        raise ImageError(
            "UNSUPPORTED_MODE", f"pixels of kind {image.mode!r} have no defined colors"
        )
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            "UNSUPPORTED_MODE", f"values {values.min()} to {values.max()} do not fit 16 bit"
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
