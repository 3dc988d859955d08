"""One self-contained HTML page about a run: pictures, scores beside baselines, curves, the search, what was run.

Everything is in the file (images as base64, no scripts, no addresses outside), so it can be mailed and archived.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import charts, console

_NOT_TERMS = {"step", "time", "time_s", "images_per_s", "data_wait", "pause_s"}
_MORE_IS_BETTER = ("psnr", "ssim", "retrieval")
_GRIDS = 5
_STYLE = """
:root{color-scheme:light}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1c2733;background:#f6f8fa;margin:0}
main{max-width:1000px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}h2{font-size:19px;margin:0 0 8px}
section{background:#fff;border:1px solid #e3e8ee;border-radius:10px;padding:20px 24px;margin:20px 0}
.lead{color:#4a5663;margin:0 0 8px}.note{color:#6b7785;font-size:14px;margin:8px 0 0}
figure{margin:12px 16px 4px 0;display:inline-block;vertical-align:top;max-width:100%}
figcaption{color:#6b7785;font-size:13px;margin-top:4px}
img{max-width:100%;height:auto;display:block}img.pixels{image-rendering:pixelated;border:1px solid #e3e8ee}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 14px 5px 0;border-bottom:1px solid #eef1f4;white-space:nowrap}
th.text{text-align:left}th{color:#6b7785;font-weight:600}td:first-child,th:first-child{text-align:left}
tr.best td{font-weight:600;background:#eef6fc}td.text{text-align:left;white-space:normal}
.big{font-size:26px;font-weight:650}.facts{display:flex;flex-wrap:wrap;gap:8px 40px;margin-top:14px}
.facts div span{display:block;color:#6b7785;font-size:13px}
code{background:#f1f4f7;border-radius:4px;padding:1px 5px;font-size:13px}
"""


@dataclass(frozen=True)
class HttpExample:
    """One real request to the served model: what was sent, what came back."""

    before: bytes
    after: bytes
    url: str
    seconds: float
    model_version: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of what was run: its name, how long it took, what came of it."""

    name: str
    seconds: float
    result: str = ""


@dataclass(frozen=True)
class Report:
    """What to show; everything but the title may be missing.

    Attributes:
        run: run directory (samples/, metrics.jsonl, run.yaml).
        evaluation: what `evaluate` returned, as JSON.
        study: contents of study.json.
        facts: label → value, for the end of the page (versions, machine, digests).
    """

    title: str
    lead: str = ""
    run: Path | None = None
    evaluation: Mapping[str, Any] | None = None
    study: Mapping[str, Any] | None = None
    http: HttpExample | None = None
    stages: Sequence[Stage] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path` and return it."""
    records = read_metrics(report.run / "metrics.jsonl") if report.run else []
    sections = [
        _http(report.http),
        _samples(report.run),
        _scores(report.evaluation),
        _losses(records),
        _study(report.study, report.evaluation),
        _stages(report.stages, report.facts),
    ]
    body = "\n".join(section for section in sections if section)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(report.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body><main><h1>{_e(report.title)}</h1><p class="lead">{_e(report.lead)}</p>\n'
        f"{_headline(report.evaluation)}\n{body}\n</main></body></html>\n",
        encoding="utf-8",
    )
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with nested terms lifted to the top; a torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for key in ("terms", "losses"):
            if isinstance(record.get(key), dict):
                record.update(record.pop(key))
        if isinstance(record.get("step"), int):
            records.append(record)
    return records


def _headline(evaluation: Mapping[str, Any] | None) -> str:
    ratios = (evaluation or {}).get("ratios") or {}
    cells = []
    for name in sorted(ratios, key=lambda n: not n.startswith("kid")):
        value, error = ratios[name].get("value"), ratios[name].get("stderr")
        if not name.startswith(("kid", "l1")) or value is None:
            continue
        spread = f" ± {error:.2f}" if error else ""
        cells.append(f'<div><div class="big">{value:.2f} ×{spread}</div><span>{_e(name)} of doing nothing</span></div>')
    return f'<div class="facts">{"".join(cells)}</div>' if cells else ""


def _http(example: HttpExample | None) -> str:
    if example is None:
        return ""
    version = f", version {_e(example.model_version)}" if example.model_version else ""
    text = f"POST <code>{_e(example.url)}</code> answered in {example.seconds * 1000:.0f} ms{version}."
    pictures = _figure(example.before, "sent", 192, True) + _figure(example.after, "came back", 192, True)
    return _section("One translation over HTTP", f'<p class="lead">{text}</p>{pictures}')


def _samples(run: Path | None) -> str:
    if run is None:
        return ""
    grids = sorted((run / "samples").glob("step-*.png"), key=_step_of)
    if not grids:
        return ""
    last = len(grids) - 1
    chosen = sorted({round(i * last / (_GRIDS - 1)) for i in range(_GRIDS)}, reverse=True)
    figures = [_grid(grids[i], i == last) for i in chosen]
    lead = "The same inputs at each time, the latest first. Rows of a grid: input, output, and the way back."
    return _section("Samples during training", f'<p class="lead">{lead}</p>{"".join(figures)}')


def _grid(path: Path, large: bool) -> str:
    return _figure(path.read_bytes(), f"after {_step_of(path):,} steps", None if large else 430, False)


def _scores(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    parts = []
    directions = evaluation.get("directions") or {"": evaluation}
    for direction, part in directions.items():
        baselines = part.get("baselines") or {}
        head = ["score", "this model", *(name.replace("_", " ") for name in baselines), "ratio to do nothing"]
        rows = []
        for name, value in (part.get("scores") or {}).items():
            if name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = part["scores"].get(f"{name}_stderr")
            ratio = (part.get("ratios") or {}).get(name) or {}
            ratio_text = "" if ratio.get("value") is None else f"{ratio['value']:.3f}"
            ratio_text += f" ± {ratio['stderr']:.3f}" if ratio.get("stderr") else ""
            arrow = "more is better" if name.startswith(_MORE_IS_BETTER) else "less is better"
            others = [_number(baseline.get(name)) for baseline in baselines.values()]
            rows.append(
                [f"{name} ({arrow})", _number(value) + (f" ± {error:.2g}" if error else ""), *others, ratio_text]
            )
        title = f"<h3>{_e(direction)}</h3>" if direction else ""
        parts.append(title + _table(head, rows))
    split, protocol = evaluation.get("split", ""), evaluation.get("protocol") or {}
    how = "; ".join(f"{key}: {value}" for key, value in protocol.items() if not isinstance(value, (dict, list)))
    note = f'<p class="note">Split: {_e(split)}. {_e(how)}</p>'
    lead = (
        "<em>Do nothing</em> gives the input back; <em>random target</em> gives training images of the target domain."
    )
    return _section("Held-out scores", f'<p class="lead">{lead}</p>{"".join(parts)}{note}')


def _losses(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    training = [r for r in records if "images_per_s" in r]  # the other lines hold scores
    names = _numeric(training)
    if not names:
        return ""
    speed = [r["images_per_s"] for r in records if isinstance(r.get("images_per_s"), (int, float))]
    wait = [r["data_wait"] for r in records if isinstance(r.get("data_wait"), (int, float))]
    note = f"Median speed {sorted(speed)[len(speed) // 2]:.0f} images/s. " if speed else ""
    note += f"Waiting for data: {100 * sum(wait) / len(wait):.1f} % of the time." if wait else ""
    caption = "Unweighted terms; thick: running mean. A loss tells who is winning, not how good the images are."
    figure = _figure(charts.curves(training, names), caption)
    evaluations = [r for r in records if "images_per_s" not in r]
    scores = [name for name in _numeric(evaluations) if not name.endswith("_stderr")]
    if scores:
        figure += _figure(charts.curves(evaluations, scores), "Held-out scores during training.")
    return _section("Curves", f'{figure}<p class="note">{_e(note)}</p>')


def _numeric(records: list[dict[str, Any]]) -> list[str]:
    found = {k: None for record in records for k, v in record.items() if isinstance(v, (int, float))}
    return [name for name in found if name not in _NOT_TERMS]


def _study(study: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> str:
    if not study or not study.get("trials"):
        return ""
    trials, best, metric = study["trials"], study.get("best"), study["metric"]
    weights = list(study["space"])
    head = ["trial", *weights, metric, "steps", "status", "seconds"]
    rows = []
    order = sorted(trials, key=lambda t: _rank(t, study.get("mode", "min")))
    for trial in order:
        status = trial["status"] + (f": {trial['error']}" if trial.get("error") else "")
        name = f"{trial['trial']}{' (published)' if trial['trial'] == 0 else ''}"
        values = [f"{trial['weights'][w]:.3g}" for w in weights]
        row = [name, *values, _number(trial.get("score")), trial["step"], status, f"{trial['time_s']:.0f}"]
        rows.append(row)
    marked = frozenset(i for i, trial in enumerate(order) if trial["trial"] == best)
    baseline = study.get("do_nothing")
    figures = _figure(
        charts.weights_against_score(trials, study["space"], best, metric),
        "Weights against score. Star: the winner; square: published; hollow: stopped early; ×: failed.",
    ) + _figure(charts.score_curves(trials, best, metric, baseline), "The score of each trial at its rungs.")
    least = "least" if study["mode"] == "min" else "largest"
    lead = f"{len(trials)} trials of at most {study['steps']:,} steps; the {least} {metric} on {study['split']} wins."
    note = f"Why this objective: {study.get('objective_reason', '')}. Trials stopped early were not trained to the end."
    return _section(
        "Search of the loss weights",
        f'<p class="lead">{_e(lead)}</p>{figures}{_table(head, rows, marked)}<p class="note">{_e(note)}</p>',
    )


def _rank(trial: Mapping[str, Any], mode: str) -> tuple[bool, bool, float]:
    score = trial.get("score")
    if score is None:
        return (True, True, 0.0)
    return (False, trial["status"] != "finished", score if mode == "min" else -score)


def _stages(stages: Sequence[Stage], facts: Mapping[str, Any]) -> str:
    if not stages and not facts:
        return ""
    total = sum(stage.seconds for stage in stages)
    rows = [[stage.name, console.duration(stage.seconds), stage.result] for stage in stages]
    if rows:
        rows.append(["total", console.duration(total), ""])
    table = _table(["stage", "time", "result"], rows, text_columns=frozenset({2})) if rows else ""
    listed = (
        _table(["", ""], [[key, value] for key, value in facts.items()], text_columns=frozenset({1})) if facts else ""
    )
    return _section("What was run", table + listed)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>"


def _figure(png: bytes, caption: str, width: int | None = None, pixels: bool = False) -> str:
    kind = "jpeg" if png[:2] == b"\xff\xd8" else "webp" if png[8:12] == b"WEBP" else "png"
    size = f' width="{width}"' if width else ""
    look = ' class="pixels"' if pixels else ""
    data = base64.b64encode(png).decode()
    image = f'<img{look}{size} alt="{_e(caption)}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{image}<figcaption>{_e(caption)}</figcaption></figure>"


def _table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    marked: frozenset[int] = frozenset(),
    text_columns: frozenset[int] = frozenset(),
) -> str:
    lines = ["<tr>" + "".join(f"<th{_left(i, text_columns)}>{_e(c)}</th>" for i, c in enumerate(head)) + "</tr>"]
    for number, row in enumerate(rows):
        cells = [f"<td{_left(i, text_columns)}>{_e(cell)}</td>" for i, cell in enumerate(row)]
        lines.append(f"<tr{' class=best' if number in marked else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _left(column: int, text_columns: frozenset[int]) -> str:
    return ' class="text"' if column in text_columns else ""


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _step_of(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)
