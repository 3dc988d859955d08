"""The decoder: every odd image of the catalogue gets its documented fate."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from models import codec
from models.errors import ImageError

WIDE = codec.Limits(formats=codec.ALL_FORMATS)


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth 48 x 80 picture, kind to JPEG."""
    y, x = np.mgrid[0:48, 0:80]
    return np.stack([x * 3, y * 5, (x + y) * 2], -1).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def code_of(data: bytes, limits: codec.Limits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        codec.decode(data, limits)
    return caught.value.code


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:33] + png_chunk(kind, body) + png[33:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_decode__plain_formats_equal_pillow(photo: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(photo), kind)
    assert np.array_equal(codec.decode(data, WIDE), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_decode__applies_every_orientation(photo: np.ndarray, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(photo), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(codec.decode(data), expected)
    info = codec.probe(data)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.plain == (orientation == 1 and kind in ("PNG", "JPEG", "WEBP"))


@pytest.mark.parametrize("orientation", [0, 99])
def test_decode__ignores_impossible_orientations(photo: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(codec.decode(saved(Image.fromarray(photo), "PNG", exif=exif)), photo)


@pytest.mark.parametrize(("background", "expected"), [((255, 255, 255), 255), ((0, 0, 0), 0), ((10, 20, 30), 10)])
def test_decode__composites_alpha(background: tuple[int, int, int], expected: int) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., 0] = 200  # a colour hidden below full transparency
    rgba[:20, :, 3] = 255
    pixels = codec.decode(saved(Image.fromarray(rgba), "PNG"), background=background)
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[30, 0].tolist() == list(background)
    assert pixels[30, 0, 0] == expected


def test_decode__half_alpha_is_rounded() -> None:
    rgba = np.full((40, 40, 4), 128, np.uint8)
    assert (
        codec.decode(saved(Image.fromarray(rgba), "PNG"))[0, 0].tolist() == [(128 * 128 + 255 * 127 + 127) // 255] * 3
    )


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (300, 1), (32896, 128), (65535, 255)])
def test_decode__scales_16_bit_and_never_clips(value: int, expected: int) -> None:
    grey = np.full((40, 50), value, np.uint16)
    for suffix in (".png", ".tiff"):
        for array in (grey, np.stack([grey] * 3, -1)):
            data = cv2.imencode(suffix, array)[1].tobytes()
            assert codec.decode(data, WIDE).shape == (40, 50, 3)
            assert np.unique(codec.decode(data, WIDE)).tolist() == [expected]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1"])
def test_decode__converts_modes_to_rgb(photo: np.ndarray, mode: str) -> None:
    image = Image.fromarray(photo).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    pixels = codec.decode(saved(image, "PNG"))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_decode__converts_cmyk() -> None:
    data = saved(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG")
    assert codec.decode(data)[20, 20] == pytest.approx([255, 0, 0], abs=3)


def test_decode__grey_jpeg_becomes_rgb(photo: np.ndarray) -> None:
    pixels = codec.decode(saved(Image.fromarray(photo).convert("L"), "JPEG"))
    assert pixels.shape == (48, 80, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode__refuses_cut_files(photo: np.ndarray, kind: str, share: float) -> None:
    data = saved(Image.fromarray(photo), kind)
    assert code_of(data[: int(len(data) * share)]) == "E_IMG_TRUNCATED"


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_decode__refuses_cut_files_of_other_formats(photo: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(photo), kind)
    assert code_of(data[: len(data) // 2], WIDE) in ("E_IMG_TRUNCATED", "E_IMG_CORRUPT")


def test_decode__refuses_wrong_checksums(photo: np.ndarray) -> None:
    data = bytearray(saved(Image.fromarray(photo), "PNG"))
    data[len(data) // 2] ^= 1
    assert code_of(bytes(data)) == "E_IMG_CORRUPT"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "E_IMG_EMPTY"),
        (b"\x00", "E_IMG_FORMAT"),
        (bytes(range(256)) * 16, "E_IMG_FORMAT"),
        (b"<!DOCTYPE html><html>404</html>", "E_IMG_FORMAT"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "E_IMG_FORMAT"),
        (b"P6 100000 100000 255\n", "E_IMG_FORMAT"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "E_IMG_FORMAT"),
        (b"GIF89a" + bytes(64), "E_IMG_FORMAT"),
        (b"\xff\xd8", "E_IMG_TRUNCATED"),
        (b"\xff\xd8\xff", "E_IMG_TRUNCATED"),
        (png_header(0, 0), "E_IMG_SIZE"),
        (png_header(1, 0), "E_IMG_SIZE"),
        (png_header(30_000, 30_000), "E_IMG_PIXELS"),
        (png_header(10_000, 10_000), "E_IMG_PIXELS"),
        (png_header(65_535, 1), "E_IMG_ASPECT"),
        (png_header(31, 31), "E_IMG_SIZE"),
        (png_header(64, 64), "E_IMG_CORRUPT"),
    ],
)
def test_decode__refuses_with_the_documented_code(data: bytes, code: str) -> None:
    assert code_of(data) == code


def test_decode__html_is_recognised() -> None:
    with pytest.raises(ImageError, match="looks like HTML"):
        codec.decode(b"\n<html><body>Not found</body></html>")


def test_decode__refuses_animations(photo: np.ndarray) -> None:
    frames = [Image.fromarray(photo), Image.fromarray(255 - photo)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert code_of(data, WIDE) == "E_IMG_ANIMATED"
        assert codec.probe(data, WIDE).animated


def test_decode__refuses_floats() -> None:
    assert code_of(saved(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF"), WIDE) == "E_IMG_DEPTH"


def test_decode__refuses_text_bombs(photo: np.ndarray) -> None:
    bomb = b"Comment\0\0" + zlib.compress(bytes(70 * 1024**2))
    assert code_of(with_chunk(codec.encode(photo), b"zTXt", bomb)) == "E_IMG_METADATA"


def test_decode__refuses_too_many_bytes(photo: np.ndarray) -> None:
    assert code_of(codec.encode(photo), codec.Limits(max_bytes=100)) == "E_IMG_BYTES"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_strip__drops_metadata_and_trailing_bytes_only(photo: np.ndarray, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera with a secret"
    data = saved(Image.fromarray(photo), kind, exif=exif) + b"<html>PK\x03\x04 trailing</html>"
    stripped = codec.strip(data)
    assert b"secret" in data
    assert b"secret" not in stripped
    assert b"trailing" not in stripped
    assert np.array_equal(codec.decode(stripped), codec.decode(data))
    assert codec.strip(stripped) == stripped


def test_strip__progressive_jpeg(photo: np.ndarray) -> None:
    data = saved(Image.fromarray(photo), "JPEG", progressive=True)
    assert np.array_equal(codec.decode(codec.strip(data)), codec.decode(data))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_encode__comes_back(photo: np.ndarray, format: str) -> None:
    back = codec.decode(codec.encode(photo, format))
    assert codec.probe(codec.encode(photo, format)).format == format
    assert np.abs(back.astype(int) - photo).mean() <= (0 if format == "png" else 3)


def test_resize__area_down_cubic_up_and_mixed(photo: np.ndarray) -> None:
    assert codec.resize(photo, 32).shape == (32, 32, 3)
    assert np.array_equal(codec.resize(photo, (24, 40)), cv2.resize(photo, (40, 24), interpolation=cv2.INTER_AREA))
    assert np.array_equal(codec.resize(photo, (96, 160)), cv2.resize(photo, (160, 96), interpolation=cv2.INTER_CUBIC))
    assert codec.resize(photo, (24, 160)).shape == (24, 160, 3)
    assert codec.resize(photo, photo.shape[:2]) is photo


def test_decode__only_image_errors_escape(photo: np.ndarray) -> None:
    rng, codes = np.random.default_rng(0), set()
    seeds = [saved(Image.fromarray(photo), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for trial in range(300):
        data = bytearray(seeds[trial % len(seeds)])
        for position in rng.integers(0, len(data), 1 + trial % 5):
            data[position] = rng.integers(0, 256)
        try:
            pixels = codec.decode(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]), WIDE)
        except ImageError as error:
            codes.add(error.code)
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
    assert len(codes) > 3
