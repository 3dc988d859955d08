"""Demo data made on the spot, with no download: real letterforms in drawn styles, each style a domain.

    from pipelines.samples import make_samples
    make_samples(Path("letters"), styles=("solid", "outline"))

Letterforms come from the fonts that matplotlib ships (six bold cuts of DejaVu, free licence). A style changes the
*shape* of what is drawn, never the colour: black on white everywhere.

* **Splits are by letter**: a letter, with all its accents and its lookalikes in other scripts, is in one split only.
* **Train and validation are unaligned**: the renderings (letter, font, layout) of a style exist in no other style.
* **Test is aligned**: one key is the same rendering in every style, hence the truth for every translation.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageFont

from models.errors import ConfigError, nearest

FONTS = {
    "sans": "DejaVuSans-Bold",
    "sansoblique": "DejaVuSans-BoldOblique",
    "serif": "DejaVuSerif-Bold",
    "serifitalic": "DejaVuSerif-BoldItalic",
    "mono": "DejaVuSansMono-Bold",
    "monooblique": "DejaVuSansMono-BoldOblique",
}
SPLITS = ("train", "val", "test")
_CATEGORIES = ("Lu", "Ll", "Lo", "Nd")
_GLYPH_PX = 112
_VAL_SHARE, _TEST_SHARE = 0.1, 0.15

Mask = np.ndarray


@dataclass(frozen=True)
class Rendering:
    """One drawing of one letter: what every style of it has in common.

    Attributes:
        extent: longer side of the glyph as a share of the image side.
        shift: of the centre, as shares of the image side.
        degrees: rotation.
    """

    letter: str
    font: str
    extent: float
    shift: tuple[float, float]
    degrees: float


@dataclass(frozen=True)
class SampleSet:
    """What `make_samples` wrote: `counts[split][style]` images below `path`, drawn from `letters[split]` letters."""

    path: Path
    styles: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    letters: dict[str, int]


def make_samples(
    dest: Path,
    *,
    seed: int = 0,
    size: int = 64,
    per_style: int = 4000,
    val: int = 200,
    test: int = 200,
    styles: tuple[str, ...] = ("solid", "outline", "stencil", "hatch"),
) -> SampleSet:
    """Write `dest/<split>/<style>/<key>.png`: `per_style` training images a style, `val` and `test` held-out ones.

    A function of its arguments: the same call writes the same bytes.

    Raises:
        ConfigError: unknown style, or a size outside 32..1024.
    """
    for style in styles:
        if style not in STYLES:
            raise ConfigError(f"unknown style '{style}'", code="E_STYLE", hint=nearest(style, STYLES))
    if not 32 <= size <= 1024:
        raise ConfigError(f"size of the demo images: {size}; allowed are 32 to 1024 pixels", code="E_SIZE")
    letters = split_letters(seed)
    counts: dict[str, dict[str, int]] = {}
    for split, wanted in zip(SPLITS, (per_style, val, test), strict=True):
        counts[split] = {}
        aligned = split == "test"
        for number, style in enumerate(styles):
            folder = Path(dest) / split / style
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(wanted):
                # Unaligned: the renderings are dealt to the styles like cards.
                rank = index if aligned else index * len(styles) + number
                rendering = rendering_at(letters[split], seed, split, rank)
                name = f"{rank:06d}-u{ord(rendering.letter):04x}-{rendering.font}.png"
                (folder / name).write_bytes(_png(draw(rendering, style, size)))
            counts[split][style] = wanted
    return SampleSet(Path(dest), tuple(styles), counts, {split: len(letters[split]) for split in SPLITS})


def rendering_at(letters: list[str], seed: int, split: str, rank: int) -> Rendering:
    """The rendering number `rank` of a split: every (letter, font) once before any comes again in another layout."""
    pairs = len(letters) * len(FONTS)
    lap, place = divmod(rank, pairs)
    order = _shuffled(pairs, seed, split, lap)
    letter, font = divmod(int(order[place]), len(FONTS))
    extent, dx, dy, turn = _uniform(seed, split, rank)
    return Rendering(
        letters[letter],
        list(FONTS)[font],
        extent=0.58 + 0.14 * extent,
        shift=(0.08 * dx - 0.04, 0.08 * dy - 0.04),
        degrees=20 * turn - 10,
    )


def draw(rendering: Rendering, style: str, size: int) -> np.ndarray:
    """A rendering in a style: uint8 `(size, size, 3)`, black on white."""
    side = max(2 * size, 128)
    ink = STYLES[style](_placed(rendering, side))
    ink = cv2.resize(ink, (size, size), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(255 - ink, cv2.COLOR_GRAY2BGR)


@lru_cache(maxsize=4)
def split_letters(seed: int) -> dict[str, list[str]]:
    """Split → letters. Groups of letters that share a base shape (accents, lookalikes) stay together."""
    groups: dict[bytes, list[str]] = {}
    for letter in _known_letters():
        base = unicodedata.normalize("NFD", letter)[0]
        groups.setdefault(hashlib.sha256(_glyph(base, "sans").tobytes()).digest(), []).append(letter)
    ordered = sorted(groups.values(), key=lambda group: _digest("split", seed, group[0]))
    total = sum(map(len, ordered))
    result: dict[str, list[str]] = {split: [] for split in SPLITS}
    for group in ordered:
        if len(result["test"]) < _TEST_SHARE * total:
            result["test"] += group
        elif len(result["val"]) < _VAL_SHARE * total:
            result["val"] += group
        else:
            result["train"] += group
    return result


@lru_cache(maxsize=1)
def _known_letters() -> list[str]:
    """Letters and digits that every font has, with at most one accent, one for each distinct shape."""
    from matplotlib.ft2font import FT2Font

    maps = [set(FT2Font(_font_path(font)).get_charmap()) for font in FONTS]
    letters = (chr(point) for point in sorted(set.intersection(*maps)))
    wanted = [c for c in letters if unicodedata.category(c) in _CATEGORIES and len(unicodedata.normalize("NFD", c)) < 3]
    distinct: dict[bytes, str] = {}
    for letter in wanted:
        glyph = _glyph(letter, "sans")
        height, width = glyph.shape
        # Superscripts and hairline letters become blobs or threads when enlarged.
        if min(height, width) >= 0.2 * _GLYPH_PX and max(height, width) >= 0.45 * _GLYPH_PX:
            distinct.setdefault(hashlib.sha256(repr(glyph.shape).encode() + glyph.tobytes()).digest(), letter)
    return list(distinct.values())


def _font_path(font: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[font]}.ttf")


@lru_cache(maxsize=16)
def _truetype(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(font), _GLYPH_PX, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16384)
def _glyph(letter: str, font: str) -> Mask:
    """Ink of a letter, cut to its bounding box: uint8, 255 is ink."""
    core = _truetype(font).getmask(letter, mode="L")
    mask = np.array(core, dtype=np.uint8).reshape(core.size[1], core.size[0])
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.zeros((1, 1), np.uint8)
    return np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _placed(rendering: Rendering, side: int) -> Mask:
    """The letter on a square canvas of `side` pixels: uint8, 255 is ink."""
    glyph = _glyph(rendering.letter, rendering.font)
    height, width = glyph.shape
    scale = rendering.extent * side / max(height, width)
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rendering.degrees, scale)
    matrix[0, 2] += side * (0.5 + rendering.shift[0]) - width / 2
    matrix[1, 2] += side * (0.5 + rendering.shift[1]) - height / 2
    return cv2.warpAffine(glyph, matrix, (side, side), flags=cv2.INTER_LINEAR)


@lru_cache(maxsize=32)
def _disc(diameter: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def _contour(ink: Mask, width: float) -> Mask:
    """A line of `width` (share of the side) along the edge of the ink."""
    brush = _disc(2 * max(1, round(width * ink.shape[0] / 2)) + 1)
    return cv2.subtract(cv2.dilate(ink, brush), cv2.erode(ink, brush))


def _solid(ink: Mask) -> Mask:
    return ink


def _outline(ink: Mask) -> Mask:
    return _contour(ink, 0.032)


def _stencil(ink: Mask) -> Mask:
    """Two bridges: horizontal cuts at a third and two thirds of the letter's height."""
    side = ink.shape[0]
    rows = np.flatnonzero(ink.max(axis=1) > 127)
    top, bottom = (rows[0], rows[-1] + 1) if rows.size else (0, side)
    cut = ink.copy()
    for third in (1 / 3, 2 / 3):
        middle, half = top + third * (bottom - top), 0.04 * side
        cut[round(middle - half) : round(middle + half)] = 0
    return cut


def _hatch(ink: Mask) -> Mask:
    """Diagonal strokes inside a thin contour."""
    return cv2.max(cv2.min(ink, _stripes(ink.shape[0])), _contour(ink, 0.018))


def _dots(ink: Mask) -> Mask:
    return cv2.min(cv2.dilate(ink, _disc(3)), _screen(ink.shape[0]))


def _shadow(ink: Mask) -> Mask:
    """A white letter that stands on a black block reaching down to the right."""
    side = ink.shape[0]
    depth = round(0.07 * side)
    block = cv2.dilate(ink, np.eye(depth, dtype=np.uint8), anchor=(depth - 1, depth - 1))
    return cv2.max(cv2.subtract(block, ink), _contour(ink, 0.02))


@lru_cache(maxsize=8)
def _stripes(side: int) -> Mask:
    period = side / 8
    diagonal = np.add.outer(np.arange(side), np.arange(side)) % period
    return np.where(diagonal < 0.45 * period, 255, 0).astype(np.uint8)


@lru_cache(maxsize=8)
def _screen(side: int) -> Mask:
    """A grid of round dots, the odd rows set off by half a period."""
    period = side / 12
    y, x = np.indices((side, side)) / period
    row = np.floor(y)
    dx, dy = (x + 0.5 * (row % 2)) % 1 - 0.5, y - row - 0.5
    return np.where(dx**2 + dy**2 < 0.38**2, 255, 0).astype(np.uint8)


STYLES: dict[str, Callable[[Mask], Mask]] = {
    "solid": _solid,
    "outline": _outline,
    "stencil": _stencil,
    "hatch": _hatch,
    "shadow": _shadow,
    "dots": _dots,
}


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


@lru_cache(maxsize=32)
def _shuffled(count: int, seed: int, split: str, lap: int) -> np.ndarray:
    key = int.from_bytes(_digest("order", seed, split, lap))
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def _uniform(seed: int, split: str, rank: int) -> tuple[float, ...]:
    """Four numbers in [0, 1)."""
    raw = _digest("layout", seed, split, rank)
    return tuple(int.from_bytes(raw[4 * i : 4 * i + 4]) / 2**32 for i in range(4))


def _png(pixels: np.ndarray) -> bytes:
    # Level 1: the images are small and mostly flat, a higher one costs three times the time for a tenth of the bytes.
    done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, "OpenCV could not encode an image that was just drawn"
    return data.tobytes()
