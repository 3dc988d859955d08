"""The report page from made-up results: complete, self-contained, and sparing with what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines import charts
from pipelines.report import HttpExample, Report, Stage, read_metrics, write_report

KID = "kid_random_v1"
STUDY = {
    "best": 1,
    "metric": KID,
    "mode": "min",
    "split": "val",
    "steps": 100,
    "space": {"cycle": {"low": 1.0, "high": 30.0, "log": True}, "identity": {"low": 0.05, "high": 15.0, "log": True}},
    "objective_reason": "unpaired",
    "do_nothing": 0.9,
    "trials": [
        {"trial": 0, "weights": {"cycle": 10.0, "identity": 5.0}, "status": "finished", "score": 0.5, "step": 100,
         "rungs": [[50, 0.7], [100, 0.5]], "time_s": 9.0},
        {"trial": 1, "weights": {"cycle": 3.0, "identity": 0.1}, "status": "finished", "score": 0.3, "step": 100,
         "rungs": [[50, 0.6], [100, 0.3]], "time_s": 9.0},
        {"trial": 2, "weights": {"cycle": 30.0, "identity": 9.0}, "status": "stopped", "score": 0.8, "step": 50,
         "rungs": [[50, 0.8]], "time_s": 5.0},
        {"trial": 3, "weights": {"cycle": 1.0, "identity": 1.0}, "status": "failed", "score": None, "step": 7,
         "rungs": [], "time_s": 1.0, "error": "phase g, term <cycle>"},
    ],
}  # fmt: skip
PART = {
    "scores": {KID: 0.2, f"{KID}_stderr": 0.01, "l1": 0.1},
    "baselines": {"do_nothing": {KID: 1.0, "l1": 0.2}, "random_target": {KID: 0.01, "l1": 0.4}},
    "ratios": {KID: {"value": 0.2, "stderr": 0.013}, "l1": {"value": 0.5, "stderr": None}},
}
EVALUATION = {
    "split": "test",
    "protocol": {"features": "random_v1"},
    **PART,
    "directions": {"a->b": PART, "b->a": PART},
}


class Page(HTMLParser):
    """Collects tags, checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.open, self.titles = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def png(value: int) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run/samples").mkdir(parents=True)
    for step in range(0, 1100, 100):
        (tmp_path / f"run/samples/step-{step}.png").write_bytes(png(step // 10))
    lines = [{"step": s, "time_s": 1.0, "images_per_s": 50.0, "data_wait": 0.02, "cycle": 1 / s} for s in range(1, 40)]
    lines.append({"step": 39, KID: 0.3})
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')
    return tmp_path / "run"


def test_write_report__everything(run, tmp_path):
    http = HttpExample(png(1), png(2), "http://127.0.0.1:8000/v1/models/letters/translate", 0.03, "1")
    report = Report(
        "Letters <solid> to outline", "lead", run, EVALUATION, STUDY, http, [Stage("train", 61, "ok")], {"torch": "2"}
    )
    text = write_report(report, tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.titles == [
        "One translation over HTTP",
        "Samples during training",
        "Held-out scores",
        "Curves",
        "Search of the loss weights",
        "What was run",
    ]
    assert len(page.images) == 2 + 5 + 2 + 2
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    assert "after 1,000 steps" in text
    assert "after 0 steps" in text
    assert "0.20 × ± 0.01" in text
    assert "phase g, term &lt;cycle&gt;" in text
    assert "Letters &lt;solid&gt; to outline" in text
    assert "1m01s" in text


def test_write_report__is_self_contained(run, tmp_path):
    text = write_report(Report("t", run=run, study=STUDY), tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert not re.findall(r"url\(", text)


def test_write_report__almost_nothing(tmp_path):
    page = Page(write_report(Report("only a title"), tmp_path / "r.html").read_text())
    assert page.titles == []
    empty = Page(write_report(Report("t", run=tmp_path / "none"), tmp_path / "r.html").read_text())
    assert empty.titles == []


def test_read_metrics__nested_terms_and_a_torn_line(run):
    records = read_metrics(run / "metrics.jsonl")
    assert len(records) == 40
    (run / "metrics.jsonl").write_text('{"step": 1, "terms": {"cycle": 2.0}}\n')
    assert read_metrics(run / "metrics.jsonl") == [{"step": 1, "cycle": 2.0}]


def test_running_mean():
    assert charts.running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]
