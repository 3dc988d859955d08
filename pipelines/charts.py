"""The figures of a report, as PNG bytes: loss curves, a score over the steps of each trial, weights against score."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID = "#1c2733", "#6b7785", "#e3e8ee"
MAIN, SECOND, BAD = "#0072b2", "#e69f00", "#c0392b"  # told apart by the colour-blind
_DPI = 130


def curves(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """One small plot a quantity: each logged value, and their running mean.

    Args:
        records: lines of metrics.jsonl, flat, with `step`.
        names: which of their keys to draw.
    """
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.3 * rows), layout="constrained")
    for index, name in enumerate(names):
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
        axes = _axes(figure, rows, columns, index + 1)
        axes.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
        if not points:
            continue
        steps, values = np.array(points, dtype=float).T
        axes.plot(steps, values, color=MAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(values, max(1, len(values) // 15)), color=MAIN, linewidth=1.8)
        axes.set_ylim(bottom=0 if values.min() >= 0 else None)
        if index >= len(names) - columns:
            axes.set_xlabel("step", fontsize=8, color=MUTED)
    return _png(figure)


def score_curves(trials: Sequence[Mapping[str, Any]], best: int | None, metric: str, baseline: float | None) -> bytes:
    """The held-out score of every trial at its rungs; the winner thick, the published weights dashed."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    for trial in trials:
        rungs = trial.get("rungs") or []
        if not rungs:
            continue
        steps, scores = zip(*rungs, strict=True)
        number = trial["trial"]
        look = {"color": MUTED, "linewidth": 1.0, "alpha": 0.7}
        if number == best:
            look = {"color": MAIN, "linewidth": 2.4, "label": f"trial {number}, the winner"}
        elif number == 0:
            look = {"color": SECOND, "linewidth": 2.0, "linestyle": "--", "label": "published weights"}
        axes.plot(steps, scores, marker="o", markersize=4, **look)
    if baseline is not None:
        axes.axhline(baseline, color=BAD, linewidth=1, linestyle=":", label="do nothing")
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.set_ylabel(metric, fontsize=8, color=MUTED)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def weights_against_score(
    trials: Sequence[Mapping[str, Any]], space: Mapping[str, Mapping[str, Any]], best: int | None, metric: str
) -> bytes:
    """One plot a searched weight: value against score; trials without a score are crosses at the upper edge."""
    columns = min(len(space), 3)
    rows = math.ceil(len(space) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    scores = [t["score"] for t in trials if t.get("score") is not None]
    top = max(scores) + 0.08 * ((max(scores) - min(scores)) or abs(max(scores)) or 1.0) if scores else 1.0
    for index, (name, bounds) in enumerate(space.items()):
        axes = _axes(figure, rows, columns, index + 1)
        if bounds.get("log", True):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator())
        for trial in trials:
            _trial_point(axes, trial, trial["weights"][name], best, top)
        axes.set_xlim(bounds["low"] * 0.85 if bounds.get("log", True) else bounds["low"], bounds["high"] * 1.15)
        if bounds.get("log", True):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            few_decades = bounds["high"] / bounds["low"] < 50
            axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)) if few_decades else NullFormatter())
        axes.set_xlabel(f"weights.{name}", fontsize=9, color=INK)
        if index % columns == 0:
            axes.set_ylabel(metric, fontsize=8, color=MUTED)
    return _png(figure)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window − 1` before it (fewer at the start)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _trial_point(axes: Axes, trial: Mapping[str, Any], value: float, best: int | None, top: float) -> None:
    score, number = trial.get("score"), trial["trial"]
    if score is None:
        axes.plot(value, top, marker="x", color=BAD, markersize=7)
        return
    stopped = trial.get("status") == "stopped"
    look: dict[str, Any] = {"marker": "o", "markersize": 6, "color": MUTED}
    if stopped:
        look["markerfacecolor"] = "white"
    if number == 0:
        look |= {"marker": "s", "color": SECOND, "markersize": 8}
    if number == best:
        look |= {"marker": "*", "color": MAIN, "markersize": 15}
    axes.plot(value, score, linestyle="none", **look)
    axes.annotate(str(number), (value, score), xytext=(6, 4), textcoords="offset points", fontsize=7, color=MUTED)


def _axes(figure: Figure, rows: int, columns: int, index: int) -> Axes:
    axes = figure.add_subplot(rows, columns, index)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(colors=MUTED, labelsize=8, which="both")
    return axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()
