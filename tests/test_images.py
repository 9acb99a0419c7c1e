"""Pictures as people really have them.

Turned, gray, transparent, cut off, huge, animated, or no pictures at all.
"""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.support.pictures import encode, noise, png_header
from tritower.datamodules.images import LIMITS, ImageError, decode, downsize

pytestmark = [  # pytest replaces the filters that tritower.datamodules.images sets
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings(
        "ignore:(Corrupt EXIF|Tag data|Truncated File|Metadata Warning|Unable)"
    ),
]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def difference(one: Image.Image, other: Image.Image) -> float:
    """The largest difference of any pixel's color, 0 to 255."""
    assert one.mode == other.mode == "RGB"
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def code_of(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as error:
        decode(data, **options)
    assert str(error.value).startswith(f"{error.value.code}: ")
    with pytest.raises(ImageError, match=error.value.code):
        downsize(data, **options)
    return error.value.code


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    picture = Image.new("RGB", (40, 20), BLUE)
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 100, "subsampling": 0}
        if kind == "JPEG"
        else {"lossless": True}
        if kind == "WEBP"
        else {}
    )
    turned = decode(encode(picture, kind, exif=exif, **options))
    expected = picture.copy()
    expected.getexif()[0x0112] = orientation
    assert difference(turned, ImageOps.exif_transpose(expected)) <= 8
    assert turned.size == ((40, 20) if orientation < 5 else (20, 40))


def test_damaged_exif_says_nothing_about_the_pixels() -> None:
    data = encode(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01\x12" * 20)
    assert decode(data).size == (60, 40)


def test_cmyk_and_inverted_ycck_become_rgb() -> None:
    for color, expected in (
        ((0, 255, 255, 0), RED),
        ((255, 255, 0, 0), BLUE),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        data = encode(Image.new("CMYK", (8, 8), color), "JPEG", quality=95)
        assert difference(decode(data), Image.new("RGB", (8, 8), expected)) <= 8


@pytest.mark.parametrize(
    ("mode", "expected"), [("RGBA", RED), ("LA", (90, 90, 90)), ("L", (90, 90, 90)), ("1", WHITE)]
)
def test_every_mode_gives_three_channels(mode: str, expected: tuple[int, int, int]) -> None:
    fill = {"RGBA": (*RED, 255), "LA": (90, 255), "L": 90, "1": 1}[mode]
    assert (
        difference(
            decode(encode(Image.new(mode, (6, 4), fill))), Image.new("RGB", (6, 4), expected)
        )
        == 0
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparency_lies_on_the_background(kind: str) -> None:
    shoe = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    shoe.paste((*GREEN, 255), (5, 5, 15, 15))
    flat = Image.new("RGB", (20, 20), WHITE)
    flat.paste(GREEN, (5, 5, 15, 15))
    data = encode(shoe, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert difference(decode(data), flat) == 0
    assert decode(data, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_half_transparent_pixels_are_blended() -> None:
    assert decode(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).getpixel((0, 0)) == (
        127,
        127,
        127,
    )


def test_palette_with_transparent_entry() -> None:
    palette = Image.new("P", (4, 2))
    palette.putpalette([*RED, *BLUE])
    palette.paste(1, (2, 0, 4, 2))
    pixels = decode(encode(palette, transparency=0))
    assert pixels.getpixel((0, 0)) == WHITE
    assert pixels.getpixel((3, 0)) == BLUE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535], [0, 128, 129, 300]], np.uint16)
    pixels = np.asarray(decode(encode(Image.fromarray(values), kind)))
    assert pixels[..., 0].tolist() == [[0, 1, 128, 255], [0, 0, 1, 1]]
    assert pixels.shape == (2, 4, 3)


def test_float_pixels_are_refused() -> None:
    assert (
        code_of(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")) == "UNSUPPORTED_MODE"
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (12, 10), color) for color in (RED, GREEN, BLUE)]
    data = encode(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert difference(decode(data), Image.new("RGB", (12, 10), RED)) == 0


def test_multi_picture_jpeg_of_a_camera() -> None:
    data = encode(
        noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40), RED)], quality=95
    )
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert difference(decode(data), noise()) < 30
    assert Image.open(io.BytesIO(downsize(data))).format == "JPEG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_cut_off_picture_is_refused(kind: str, share: float) -> None:
    data = encode(noise(200, 150), kind)
    assert decode(data).size == (200, 150)
    assert code_of(data[: int(len(data) * share)]) == "TRUNCATED_IMAGE"


def test_cut_off_progressive_jpeg_is_refused_also_when_downsized() -> None:
    data = encode(noise(600, 400), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="TRUNCATED_IMAGE"):
        downsize(data[: len(data) // 2], 64)


def test_empty_file_and_error_page_have_different_codes() -> None:
    assert code_of(b"") == "EMPTY_FILE"
    assert code_of(b"<html>404 not found</html>") == "NOT_AN_IMAGE"
    with pytest.raises(ImageError, match="it starts with '<html>404"):
        decode(b"<html>404 not found</html>")


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='x'/>",
        b"8BPS\0\1" + b"\0" * 40,
    ],
)
def test_formats_that_run_more_than_a_decoder_are_not_opened(data: bytes) -> None:
    assert code_of(data) == "NOT_AN_IMAGE"


def test_flipped_bit_in_png_data_is_noticed() -> None:
    data = bytearray(encode(noise()))
    data[len(data) // 2] ^= 4
    assert code_of(bytes(data)) == "DAMAGED_IMAGE"


@pytest.mark.parametrize(
    "size", [(30_000, 30_000), (12_000, 8_000), (6_400, 6_400), (2**31 - 1, 2**31 - 1)]
)
def test_huge_picture_is_refused_from_its_header(size: tuple[int, int]) -> None:
    data = png_header(*size)
    tracemalloc.start()
    start = time.perf_counter()
    assert code_of(data) in (
        "IMAGE_TOO_LARGE",
        "DAMAGED_IMAGE" if size[0] > 2**30 else "IMAGE_TOO_LARGE",
    )
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_limits_can_be_set() -> None:
    data = encode(noise(100, 50))
    assert code_of(data, limits=LIMITS._replace(max_pixels=4_999)) == "IMAGE_TOO_LARGE"
    assert code_of(data, limits=LIMITS._replace(max_bytes=len(data) - 1)) == "FILE_TOO_LARGE"
    assert decode(data, limits=LIMITS._replace(max_pixels=5_000)).size == (100, 50)


@pytest.mark.parametrize(
    ("size", "code"),
    [((1, 1), "IMAGE_TOO_SMALL"), ((1, 500), "IMAGE_TOO_SMALL"), ((2, 500), "IMAGE_SHAPE")],
)
def test_pictures_that_would_cost_more_than_they_show(size: tuple[int, int], code: str) -> None:
    assert code_of(encode(Image.new("RGB", size))) == code


def test_bomb_in_a_text_chunk_is_refused() -> None:
    content = b"k\0\0" + zlib.compress(b"\0" * 200_000_000)
    chunk = (
        struct.pack(">I", len(content))
        + b"zTXt"
        + content
        + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    )
    good = encode(noise())
    start = time.perf_counter()
    assert code_of(good[:33] + chunk + good[33:]) == "DAMAGED_IMAGE"
    assert time.perf_counter() - start < 2


def test_ten_thousand_frames_cost_one() -> None:
    frames = [Image.new("P", (64, 64), number % 2) for number in range(2)]
    two = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    start = time.perf_counter()
    assert decode(two[:-1] + two[two.index(b"\x21\xf9") : -1] * 10_000 + b";").size == (64, 64)
    assert time.perf_counter() - start < 1


def test_clean_small_jpeg_is_kept_byte_for_byte() -> None:
    data = encode(noise(), "JPEG", quality=50)
    assert downsize(data) == data
    assert downsize(encode(noise().convert("L"), "JPEG")) == encode(noise().convert("L"), "JPEG")


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode(noise(), "PNG"),
        lambda: encode(noise(300, 200), "JPEG"),
        lambda: encode(noise(), "JPEG", exif=_orientation(6)),
        lambda: encode(noise(), "JPEG", comment=b"x" * 60_000),
        lambda: encode(Image.new("CMYK", (9, 9)), "JPEG"),
    ],
    ids=["png", "large", "turned", "metadata", "cmyk"],
)
def test_everything_else_becomes_an_upright_rgb_jpeg(make: Callable[[], bytes]) -> None:
    data = make()
    small = downsize(data, 256)
    image = Image.open(io.BytesIO(small))
    assert small != data
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert max(image.size) <= 256
    assert image.getexif().get(0x0112, 1) == 1
    assert difference(decode(small), decode(data, max_side=256)) < 40
    assert downsize(small, 256) == small


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_downsized_sides_keep_their_ratio_and_pass_the_limits_again() -> None:
    for size in ((1000, 10), (999, 998), (257, 256), (10, 1000), (4000, 3000)):
        image = decode(downsize(encode(Image.new("RGB", size)), 64))
        assert max(image.size) == 64
        assert abs(image.width - 64 * size[0] / max(size)) <= 1.5


def test_jpeg_shrunk_while_decoding_looks_like_one_shrunk_afterwards() -> None:
    data = encode(noise(2000, 1500), "JPEG", quality=95)
    whole = decode(data).resize((200, 150), Image.Resampling.LANCZOS)
    assert difference(decode(data, max_side=200), whole) < 12


SEEDS = {
    "jpeg": encode(noise(), "JPEG"),
    "progressive": encode(noise(), "JPEG", progressive=True, exif=_orientation(6)),
    "cmyk": encode(noise().convert("CMYK"), "JPEG"),
    "png": encode(noise(), "PNG"),
    "palette": encode(noise().convert("P"), "PNG", transparency=3),
    "alpha": encode(noise().convert("RGBA"), "PNG"),
    "sixteen": encode(
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"
    ),
    "gif": encode(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
    "webp": encode(noise(), "WEBP"),
    "bmp": encode(noise(), "BMP"),
    "tiff": encode(noise(), "TIFF", compression="tiff_lzw"),
    "avif": encode(noise(), "AVIF"),
}


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "splice", "header"]),
            st.floats(0, 1),
            st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=4,
    ),
)
@example(kind="jpeg", edits=[("cut", 0.0, b"x")])
def test_mutated_pictures_are_decoded_or_refused_and_never_crash(
    kind: str, edits: list[tuple[str, float, bytes]]
) -> None:
    data = bytearray(SEEDS[kind])
    for edit, place, content in edits:
        position = int(place * len(data))
        if edit == "cut":
            del data[position:]
        elif edit == "splice":
            data[position:position] = content
        else:
            position = position if edit == "flip" else int(place * 40)
            data[position : position + len(content)] = content
    start = time.perf_counter()
    try:
        image = decode(bytes(data), limits=LIMITS._replace(max_pixels=1_000_000))
    except ImageError as error:
        assert error.code.isupper()
        assert len(error.reason) < 300
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 1_000_000
        assert decode(downsize(bytes(data), 64)).mode == "RGB"
    assert time.perf_counter() - start < 2
