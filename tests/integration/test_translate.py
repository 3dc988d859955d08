from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models import codec, system_class
from models.bundle import load_bundle, save_bundle
from models.errors import ConfigError, DataError, RequestError
from models.system import Condition
from models.translator import Translator
from pipelines.storage import Store
from pipelines.translate import REPORT, translate


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with a small CycleGAN, untrained."""
    torch.manual_seed(5)
    cls = system_class("cyclegan")
    system = cls(cls.Config(size=32, width=4, blocks=1), domains=("color", "mono"))
    directory = tmp_path_factory.mktemp("run")
    save_bundle(directory / "bundle", system, size=32, step=1, ema=False)
    return directory


def picture(seed: int, height: int = 40, width: int = 45) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_translate__s3_prefix_with_bad_images_then_resume(ray_session, s3, run_dir):
    bundle = s3.uri("translate/run/bundle")
    for path in (run_dir / "bundle").iterdir():
        Store(bundle).write(path.name, path.read_bytes())
    source, target = Store(s3.uri("translate/in")), Store(s3.uri("translate/out"))
    names = [f"{i:02}.png" for i in range(20)] + ["deeper/photo one.jpeg"]
    for i, name in enumerate(names):
        source.write(name, codec.encode(picture(i), "jpeg" if name.endswith("jpeg") else "png"))
    source.write("broken.png", codec.encode(picture(1))[:700])
    source.write("page.jpg", b"<html>")
    source.write("notes.txt", b"not an image")

    first = translate(s3.uri("translate/run"), source.uri, target.uri, Condition(to="mono"), workers=2)
    assert (first.done, first.skipped, first.failed) == (21, 0, 2)
    assert first.report == target.join(REPORT)
    report = [json.loads(line) for line in target.read(REPORT).decode().splitlines()]
    assert [(row["path"], row["code"]) for row in report] == [
        ("broken.png", "E_IMG_TRUNCATED"),
        ("page.jpg", "E_IMG_FORMAT"),
    ]
    results = [path for path, _ in target.list() if path != REPORT]
    assert results == sorted([*names[:-1], "deeper/photo one.png"])
    (expected,) = Translator(load_bundle(run_dir / "bundle")).pixels([picture(3)], Condition(to="mono"))
    difference = codec.decode(target.read("03.png")).astype(int) - expected
    assert np.abs(difference).max() <= 1

    target.delete("07.png")
    second = translate(bundle, source.uri, target.uri, Condition(to="mono"), resume=True)
    assert (second.done, second.skipped, second.failed) == (1, 20, 2)
    assert target.exists("07.png")


def test_translate__mistakes_come_before_any_work(run_dir, tmp_path):
    (tmp_path / "in").mkdir()
    bundle, source, target = str(run_dir), str(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(DataError, match="no images below"):
        translate(bundle, source, target)
    (tmp_path / "in" / "a.png").write_bytes(codec.encode(picture(1)))
    (tmp_path / "in" / "a.jpg").write_bytes(codec.encode(picture(1), "jpeg"))
    with pytest.raises(DataError, match=r"two images would get one name: a\.jpg and a\.png"):
        translate(bundle, source, target)
    with pytest.raises(ConfigError, match="it offers color to mono, mono to color"):
        translate(bundle, source, target, Condition(to="foto"))
    with pytest.raises(RequestError, match="leave `seed` away"):
        translate(bundle, source, target, Condition(seed=1))
    with pytest.raises(ConfigError, match="destination lies inside the source"):
        translate(bundle, source, f"{source}/out")
    with pytest.raises(ConfigError, match="workers=0"):
        translate(bundle, source, target, workers=0)
    assert not (tmp_path / "out").exists()
