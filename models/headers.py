"""What a JPEG or PNG file says about itself, read without decoding a pixel; used by models.codec only.

Walking the segments first is what makes decoding safe: sizes are known before anything is allocated, a cut file is told
from a corrupt one, and metadata (GPS, thumbnails, compressed text, trailing bytes) never reaches a decoder or a shard.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from models.errors import ImageError

_MAX_TEXT_BYTES = 4 * 1024**2
_MAX_SCANS = 100
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colour type → channels as stored; a palette counts as three.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Header:
    """Facts of one file; `essential` is the same image without metadata and trailing bytes."""

    width: int
    height: int
    channels: int
    depth: int
    orientation: int
    animated: bool
    transparent: bool
    palette: bool
    essential: bytes


def truncated(kind: str, size: int) -> ImageError:
    """The error of a file that was cut off."""
    return ImageError(f"the {kind} file ends too early ({size:,} bytes)", code="E_IMG_TRUNCATED", hint="copy it again")


def corrupt(kind: str, detail: str) -> ImageError:
    """The error of a file whose content contradicts itself."""
    return ImageError(f"the {kind} data is damaged: {detail}", code="E_IMG_CORRUPT", hint="copy it again")


def read_jpeg(data: bytes) -> Header:
    """Walk the segments of a JPEG file up to its end marker.

    Raises:
        ImageError: E_IMG_TRUNCATED, E_IMG_CORRUPT, E_IMG_TIMEOUT (absurdly many scans).
    """
    position, scans, orientation = 2, 0, 1
    frame: tuple[int, int, int, int] | None = None
    kept = [data[:2]]
    while True:
        while data[position : position + 2] == b"\xff\xff":
            position += 1
        if position + 2 > len(data):
            raise truncated("JPEG", len(data))
        if data[position] != 0xFF:
            raise corrupt("JPEG", f"no marker at byte {position:,}")
        marker = data[position + 1]
        if marker == 0xD9:
            kept.append(b"\xff\xd9")
            break
        if position + 4 > len(data):
            raise truncated("JPEG", len(data))
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if end > len(data):
            raise truncated("JPEG", len(data))
        segment = data[position + 4 : end]
        if marker in _SOF:
            if len(segment) < 6:
                raise corrupt("JPEG", "short frame header")
            depth, height, width, channels = struct.unpack_from(">BHHB", segment)
            frame = (width, height, channels, depth)
        elif marker == 0xE1 and segment[:6] == b"Exif\0\0":
            orientation = exif_orientation(segment)
        if marker == 0xDA:
            scans += 1
            if scans > _MAX_SCANS:
                raise ImageError(
                    f"a JPEG of more than {_MAX_SCANS} scans would take too long to decode", code="E_IMG_TIMEOUT"
                )
            following = _NEXT_MARKER.search(data, end)
            if following is None:
                raise truncated("JPEG", len(data))
            end = following.start()
        # JFIF (E0) and Adobe (EE) say how the colours are coded; the other application segments and comments do not.
        if marker in (0xE0, 0xEE) or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[position:end])
        position = end
    if frame is None or scans == 0:
        raise corrupt("JPEG", "no image in it")
    return Header(*frame, orientation, False, False, False, b"".join(kept))


def read_png(data: bytes) -> Header:
    """Walk the chunks of a PNG file, checking each checksum.

    Raises:
        ImageError: E_IMG_TRUNCATED, E_IMG_CORRUPT, E_IMG_METADATA (compressed text that inflates without bound).
    """
    position, orientation, frames, transparent = 8, 1, 1, False
    kept = [_PNG_SIGNATURE]
    image: tuple[int, int, int, int] | None = None
    while True:
        if position + 8 > len(data):
            raise truncated("PNG", len(data))
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise truncated("PNG", len(data))
        body = data[position + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != struct.unpack_from(">I", data, end - 4)[0]:
            raise corrupt("PNG", f"wrong checksum in the {kind.decode('latin-1')} chunk at byte {position:,}")
        if image is None:
            if kind != b"IHDR" or length != 13 or body[9] not in _PNG_CHANNELS:
                raise corrupt("PNG", "no valid header chunk")
            image = struct.unpack_from(">IIBB", body)
        elif kind == b"tRNS":
            transparent = True
        elif kind == b"acTL" and length >= 4:
            frames = struct.unpack_from(">I", body)[0]
        elif kind == b"eXIf":
            orientation = exif_orientation(body)
        elif kind in (b"zTXt", b"iTXt", b"iCCP"):
            _check_text(kind, body)
        if kind in _PNG_KEPT:
            kept.append(data[position:end])
        position = end
        if kind == b"IEND":
            break
    width, height, depth, colour = image
    return Header(
        width=width,
        height=height,
        channels=_PNG_CHANNELS[colour],
        depth=depth,
        orientation=orientation,
        animated=frames > 1,
        transparent=transparent or colour in (4, 6),
        palette=colour == 3,
        essential=b"".join(kept),
    )


def exif_orientation(block: bytes) -> int:
    """Orientation 1..8 of an EXIF block; 1 where it is absent, out of range or unreadable."""
    from PIL import Image

    try:
        exif = Image.Exif()
        exif.load(block)
        value = exif.get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  damaged EXIF is common and harmless: the image is shown as stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_text(kind: bytes, body: bytes) -> None:
    _, _, rest = body.partition(b"\0")
    if kind == b"iTXt":
        if rest[:1] != b"\1":
            return
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        rest = rest[1:]
    try:
        size = len(zlib.decompressobj().decompress(rest, _MAX_TEXT_BYTES + 1))
    except zlib.error:
        return
    if size > _MAX_TEXT_BYTES:
        raise ImageError(
            f"compressed text of more than {_MAX_TEXT_BYTES // 1024**2} MiB in the PNG's metadata",
            code="E_IMG_METADATA",
            hint="save the image again without metadata",
        )
