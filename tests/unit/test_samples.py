from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.errors import ConfigError
from pipelines import samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return samples.make_samples(tmp_path_factory.mktemp("letters"), per_style=60, val=12, test=12)


def names(made, split, style):
    return sorted(path.name for path in (made.path / split / style).iterdir())


def digest(folder: Path) -> str:
    h = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        h.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return h.hexdigest()


def test_make_samples__writes_the_counts_it_reports(made):
    for split, wanted in (("train", 60), ("val", 12), ("test", 12)):
        for style in made.styles:
            assert len(names(made, split, style)) == wanted == made.counts[split][style]


def test_make_samples__test_is_aligned_and_the_rest_is_disjoint(made):
    aligned = [names(made, "test", style) for style in made.styles]
    assert all(keys == aligned[0] for keys in aligned)
    for split in ("train", "val"):
        every = [name for style in made.styles for name in names(made, split, style)]
        assert len(every) == len(set(every))


def test_make_samples__is_a_function_of_its_arguments(tmp_path, made):
    samples.make_samples(tmp_path / "again", per_style=60, val=12, test=12)
    samples.make_samples(tmp_path / "other", per_style=60, val=12, test=12, seed=1)
    assert digest(tmp_path / "again") == digest(made.path) != digest(tmp_path / "other")


def test_split_letters__shapes_are_in_one_split_only():
    letters = samples.split_letters(0)
    groups = {split: {samples._glyph(c, "sans").tobytes() for c in letters[split]} for split in letters}
    assert sum(len(group) for group in letters.values()) > 900
    assert not groups["train"] & groups["val"]
    assert not groups["train"] & groups["test"]
    split_of = {c: split for split, found in letters.items() for c in found}
    assert split_of["A"] == split_of["Ä"]
    assert "Α" not in split_of, "Greek Alpha looks like Latin A"


def test_rendering_at__deals_each_letter_and_font_once_before_any_returns():
    letters = ["A", "B", "C"]
    lap = len(letters) * len(samples.FONTS)
    dealt = [samples.rendering_at(letters, 0, "train", rank) for rank in range(2 * lap)]
    pairs = [(r.letter, r.font) for r in dealt]
    assert len(set(pairs[:lap])) == len(set(pairs[lap:])) == lap
    assert len({(r.extent, r.shift, r.degrees) for r in dealt}) == 2 * lap


def test_draw__styles_differ_by_shape_and_stay_inside_the_frame(made):
    letters = samples.split_letters(0)["test"]
    for rank in range(40):
        rendering = samples.rendering_at(letters, 0, "test", rank)
        drawn = {style: samples.draw(rendering, style, 64) for style in samples.STYLES}
        for style, image in drawn.items():
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
            assert (image[0] == 255).all() and (image[:, 0] == 255).all(), (rendering, style)
            for other in samples.STYLES:
                if other != style:
                    difference = cv2.absdiff(image, drawn[other]).mean() / 255
                    assert difference > 0.01, (rendering, style, other)


def test_make_samples__unknown_style_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'outline'"):
        samples.make_samples(tmp_path, styles=("solid", "outlin"))
    with pytest.raises(ConfigError, match="allowed are 32 to 1024"):
        samples.make_samples(tmp_path, size=8)
