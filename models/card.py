"""card.md of a bundle: what config.json says, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card(document: Mapping[str, Any]) -> str:
    """card.md: config.json for people, in Markdown."""
    data, scores = document.get("data") or {}, document.get("scores") or {}
    directions = [f"{d['source']} to {d['to']}" for d in document["conditioning"].get("directions", [])]
    average = "moving average of the weights" if document.get("ema") else "weights of the last step"
    lines = [
        f"# {document['system']}: {', '.join(directions)}",
        "",
        f"* domains: {', '.join(document['domains'])}",
        f"* trained at {document['size']} px for {document.get('step', '?')} steps; {average}",
        f"* data: {data.get('uri', 'unknown')} (digest {data.get('digest', 'unknown')})",
        f"* licence of the data: {data.get('licence') or 'not stated'}",
        f"* sha256 of weights.safetensors: `{document['weights_sha256']}`",
        f"* code version: {document.get('code_version') or 'unknown'}",
        "",
        "## Loss weights",
        "",
        *(_table(document.get("loss_weights") or {}) or ["Not recorded."]),
        "",
        "## Scores",
        "",
        *(_table(scores) or ["Not evaluated."]),
        "",
        "An image of another kind than the source domain is translated too; the result then means nothing.",
        "",
    ]
    return "\n".join(lines)


def _table(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _table(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            rows.append(f"* {prefix}{name}: {value:.4g}")
        else:
            rows.append(f"* {prefix}{name}: {value}")
    return rows
