"""Results as text: what the commands print where `--json` is not given."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateResult

_WIDTH = 100


def evaluation(result: EvaluateResult) -> str:
    """Scores beside their baselines, a table a direction."""
    parts = []
    for name, direction in result.directions.items():
        scores, baselines = direction["scores"], direction["baselines"]
        metrics = [m for m in scores if not m.endswith("_stderr")]
        rows = []
        for metric in metrics:
            row = [metric, _score(scores, metric), *(_score(values, metric) for values in baselines.values())]
            ratio = direction["ratios"].get(metric)
            row.append("" if not ratio or ratio["value"] is None else _plus_minus(ratio["value"], ratio["stderr"]))
            rows.append(row)
        heads = ["metric", "this model", *(b.replace("_", " ") for b in baselines), "ratio to do nothing"]
        parts.append(_render(f"{name}, {result.split} split", heads, rows))
    return "\n".join(parts)


def dataset(report: Mapping[str, Any]) -> str:
    """Counts by domain and split, and what is aligned."""
    splits = report["splits"]
    rows = [
        [domain, *(f"{splits[split].get(domain, {}).get('count', 0):,}" for split in splits)]
        for domain in report["domains"]
    ]
    lines = [_render(report["uri"], ["domain", *splits], rows)]
    for split, pairs in report["aligned"].items():
        if pairs:
            lines.append(f"aligned in {split}: " + "; ".join(" and ".join(pair) for pair in pairs))
    lines.append(f"quarantined: {report['quarantined']}")
    if report["verified_shards"]:
        lines.append(f"verified: {report['verified_shards']} shards, {report['verified_images']:,} images")
    return "\n".join(lines)


def _score(values: Mapping[str, float], metric: str) -> str:
    return _plus_minus(values[metric], values.get(f"{metric}_stderr")) if metric in values else ""


def _plus_minus(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" if stderr is None else f"{value:.4g} ± {stderr:.2g}"


def _render(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue().rstrip()
