"""Bytes ↔ uint8 images: the only image decoder of the project, for training, evaluation and serving alike.

JPEG goes through simplejpeg and plain PNG through OpenCV (the fastest, same pixels); odd formats through Pillow, opened
with the one format that the first bytes announce. Every conversion is explicit: EXIF orientation is applied, alpha is
composited, 16-bit is scaled by 1/257 and never clipped, animations and floats are refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg

from models import headers
from models.errors import ConfigError, ImageError

SERVED_FORMATS = ("jpeg", "png", "webp")
ALL_FORMATS = ("jpeg", "png", "webp", "bmp", "gif", "tiff")
_TITLES = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF"}
_FLOAT_HINT = "save it as 8-bit or 16-bit integers"


@dataclass(frozen=True)
class Limits:
    """What is refused before any pixel is decoded.

    Args:
        max_bytes: size of the file.
        max_pixels: width × height.
        min_side: shorter side, pixels.
        max_aspect: longer side / shorter side.
        formats: names out of ALL_FORMATS.
    """

    max_bytes: int = 32 * 1024**2
    max_pixels: int = 25_000_000
    min_side: int = 32
    max_aspect: float = 64.0
    formats: tuple[str, ...] = SERVED_FORMATS


@dataclass(frozen=True)
class ImageInfo:
    """What the header says. `width` and `height` are those of the upright image; `channels` and `depth` as stored.

    `plain` means that the stored samples are already upright 8-bit grey or RGB without alpha or palette.
    """

    format: str
    width: int
    height: int
    channels: int
    depth: int
    exif_orientation: int
    animated: bool
    plain: bool


def probe(data: bytes, limits: Limits | None = None) -> ImageInfo:
    """Read the header and check the limits, without decoding.

    Raises:
        ImageError: E_IMG_EMPTY, E_IMG_BYTES, E_IMG_FORMAT, E_IMG_TRUNCATED, E_IMG_CORRUPT, E_IMG_METADATA, E_IMG_SIZE,
            E_IMG_PIXELS, E_IMG_ASPECT, E_IMG_TIMEOUT.
    """
    return _open(data, limits or Limits())[0]


def decode(data: bytes, limits: Limits | None = None, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Decode to an upright uint8 RGB array (h, w, 3).

    Args:
        data: the whole file: JPEG, PNG or WebP (BMP, single-frame GIF and TIFF where `limits.formats` allows them).
        limits: sizes and formats to refuse.
        background: colour that transparent pixels are composited on.

    Raises:
        ImageError: the codes of `probe`, and E_IMG_ANIMATED, E_IMG_DEPTH.
    """
    info, header, image = _open(data, limits or Limits())
    if info.animated:
        raise ImageError(
            f"an animated {_TITLES[info.format]}", code="E_IMG_ANIMATED", hint="extract the frames that are wanted"
        )
    if info.format == "jpeg":
        pixels = _decode_jpeg(data, info)
    elif header is not None:
        pixels = _decode_png(header, background)
    else:
        pixels = _from_pillow(image, info, data, background)
    return np.ascontiguousarray(_upright(pixels, info.exif_orientation))


def strip(data: bytes) -> bytes:
    """The same JPEG or PNG, sample for sample, without metadata (GPS, thumbnails, profiles) and trailing bytes."""
    kind = _sniff(data)
    if kind == "jpeg":
        return headers.read_jpeg(data).essential
    if kind == "png":
        return headers.read_png(data).essential
    raise ImageError(f"cannot strip a {kind or 'file of unknown kind'}; allowed: JPEG, PNG", code="E_IMG_FORMAT")


def encode(pixels: np.ndarray, format: str = "png", quality: int = 95) -> bytes:
    """Encode uint8 RGB (h, w, 3); `quality` (1..100) is for JPEG and WebP. No metadata is written."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise AssertionError(f"encode() takes uint8 (h, w, 3), got {pixels.dtype} {pixels.shape}")
    pixels = np.ascontiguousarray(pixels)
    if format == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="444")
    from PIL import Image

    buffer = io.BytesIO()
    if format == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    elif format == "webp":
        Image.fromarray(pixels).save(buffer, "WEBP", quality=quality)
    else:
        raise ConfigError(f"unknown image format '{format}'; allowed: png, jpeg, webp", code="E_IMG_FORMAT")
    return buffer.getvalue()


def resize(pixels: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize uint8 (h, w, 3) to `size` = (h, w) (an int means a square): area averaging down, cubic up, per axis."""
    height, width = (size, size) if isinstance(size, int) else size
    for axis_size in ((min(height, pixels.shape[0]), min(width, pixels.shape[1])), (height, width)):
        if axis_size != pixels.shape[:2]:
            smaller = axis_size[0] <= pixels.shape[0] and axis_size[1] <= pixels.shape[1]
            method = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
            pixels = cv2.resize(pixels, (axis_size[1], axis_size[0]), interpolation=method)
    return pixels


def _open(data: bytes, limits: Limits) -> tuple[ImageInfo, headers.Header | None, Any]:
    if not data:
        raise ImageError("the file is empty (0 bytes)", code="E_IMG_EMPTY")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the file is too large: {len(data):,} bytes; at most {limits.max_bytes:,}", code="E_IMG_BYTES"
        )
    kind = _sniff(data)
    if kind not in limits.formats:
        raise _wrong_format(data, kind, limits.formats)
    header, image = None, None
    if kind == "jpeg" or kind == "png":
        header = headers.read_jpeg(data) if kind == "jpeg" else headers.read_png(data)
        width, height, orientation, animated = header.width, header.height, header.orientation, header.animated
        channels, depth = header.channels, header.depth
        plain = (
            not (header.transparent or header.palette or animated)
            and orientation == 1
            and depth == 8
            and channels in (1, 3)
        )
    else:
        assert kind is not None
        image = _open_pillow(data, kind)
        (width, height), animated = image.size, getattr(image, "n_frames", 1) > 1
        orientation = image.getexif().get(0x0112, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        channels, depth = len(image.getbands()), _pillow_depth(image)
        plain = image.mode == "RGB" and orientation == 1 and depth == 8 and not animated
    if orientation >= 5:
        width, height = height, width
    _check_size(width, height, limits)
    return ImageInfo(kind, width, height, channels, depth, orientation, animated, plain), header, image


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError(
            f"too many pixels: {width:,} x {height:,}; at most {limits.max_pixels:,}",
            code="E_IMG_PIXELS",
            hint="make the image smaller",
        )
    if min(width, height) < 1:
        raise ImageError(f"an image of {width} x {height} pixels", code="E_IMG_SIZE")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(
            f"too long and thin: {width:,} x {height:,}; at most {limits.max_aspect:g} to 1", code="E_IMG_ASPECT"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(
            f"too small: {width} x {height} pixels; at least {limits.min_side} on each side", code="E_IMG_SIZE"
        )


def _sniff(data: bytes) -> str | None:
    if data[:2] == b"\xff\xd8":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    return "bmp" if data[:2] == b"BM" else None


def _wrong_format(data: bytes, kind: str | None, allowed: Sequence[str]) -> ImageError:
    start = data[:512].lstrip().lower()
    names = ", ".join(_TITLES[name] for name in allowed)
    if kind is not None:
        looks = f"a {_TITLES[kind]} image"
    elif start.startswith((b"<!doctype html", b"<html")):
        looks = "it looks like HTML, perhaps a saved error page"
    elif b"<svg" in start:
        looks = "an SVG drawing"
    elif data[4:8] == b"ftyp":
        looks = "a HEIC or AVIF image"
    elif start.startswith((b"%pdf", b"%!ps")):
        looks = "a PDF or PostScript document"
    else:
        looks = "its first bytes are of no known image format"
    return ImageError(f"not an image of an allowed format: {looks}; allowed: {names}", code="E_IMG_FORMAT")


def _open_pillow(data: bytes, kind: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=[kind.upper()])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too many pixels in the header", code="E_IMG_PIXELS", hint="make it smaller") from error
    except UnidentifiedImageError as error:
        raise headers.corrupt(_TITLES[kind], "its header cannot be read") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged headers
        raise headers.corrupt(_TITLES[kind], _short(error)) from error


def _pillow_depth(image: Any) -> int:
    if image.mode in ("F", "I"):
        return 32
    bits = getattr(image, "tag_v2", {}).get(258, (8,))
    return 16 if image.mode.startswith("I;16") or max(bits if isinstance(bits, tuple) else (bits,)) == 16 else 8


def _decode_jpeg(data: bytes, info: ImageInfo) -> np.ndarray:
    if info.depth != 8:
        raise ImageError(f"a {info.depth}-bit JPEG; only 8-bit ones are supported", code="E_IMG_DEPTH")
    if info.channels == 4:
        return _from_pillow(_open_pillow(data, "jpeg"), info, data, (255, 255, 255))
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        reason = str(error)
    if "extraneous" in reason:
        # Padding between segments: many cameras write it, and no pixel depends on it.
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=False)
    if "premature" in reason.lower():
        raise headers.truncated("JPEG", len(data))
    raise headers.corrupt("JPEG", reason[:120])


def _decode_png(header: headers.Header, background: tuple[int, int, int]) -> np.ndarray:
    kind = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    if header.depth < 8 or header.palette or (header.transparent and header.depth == 8):
        info = ImageInfo("png", header.width, header.height, header.channels, 8, 1, False, False)
        return _from_pillow(_open_pillow(header.essential, "png"), info, header.essential, background)
    pixels = cv2.imdecode(np.frombuffer(header.essential, np.uint8), kind)
    if pixels is None or pixels.shape[:2] != (header.height, header.width):
        raise headers.corrupt("PNG", "its pixels cannot be decompressed")
    return _to_rgb8(pixels, background)


def _to_rgb8(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """OpenCV's grey, BGR or BGRA of 8 or 16 bits → RGB of 8."""
    if pixels.dtype == np.uint16:
        # 65535 / 257 = 255 exactly: full scale stays full scale, and nothing is clipped.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ImageError(f"samples of type {pixels.dtype}", code="E_IMG_DEPTH", hint=_FLOAT_HINT)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 4:
        return _composite(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA), background)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _from_pillow(image: Any, info: ImageInfo, data: bytes, background: tuple[int, int, int]) -> np.ndarray:
    title = _TITLES[info.format]
    if info.depth == 32:
        raise ImageError(f"a 32-bit {title} (mode {image.mode})", code="E_IMG_DEPTH", hint=_FLOAT_HINT)
    if info.depth == 16:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise headers.corrupt(title, "its pixels cannot be decoded")
        return _to_rgb8(pixels, background)
    try:
        image.load()
        if image.mode == "CMYK":
            return np.asarray(_cmyk_to_rgb(image))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            return _composite(np.asarray(image.convert("RGBA")), background)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, …
        if "truncated" in str(error).lower():
            raise headers.truncated(title, len(data)) from error
        raise headers.corrupt(title, _short(error)) from error


def _cmyk_to_rgb(image: Any) -> Any:
    profile = image.info.get("icc_profile")
    if profile:
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile is ignored, as every viewer does
    return image.convert("RGB")


def _composite(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.uint32)
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.uint32) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (2, 5):
        pixels = pixels[:, ::-1]
    elif orientation in (4, 7):
        pixels = pixels[::-1]
    turns = {3: 2, 5: 1, 6: -1, 7: 1, 8: 1}.get(orientation, 0)
    return np.rot90(pixels, turns)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
