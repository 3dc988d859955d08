"""Golden curves: the loss terms of twenty steps of every system, in float32 on the CPU, from a fixed seed.

`make golden` writes them anew; the changelog then says why, under **(numerics)**.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.contract.small import NAMES, build, engine, train

CURVES = Path(__file__).parent / "curves.json"
STEPS = 20


@pytest.mark.parametrize("name", NAMES)
def test_curve__is_the_golden_one(name: str) -> None:
    e = engine(build(name), ranks=2, hosted=(0, 1))
    train(e, STEPS)
    rows = [{key: float(f"{value:.6g}") for key, value in row.items()} for row in e.read()]
    stored = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if os.environ.get("I2I_WRITE_GOLDEN") == "1":
        CURVES.write_text(json.dumps(stored | {name: rows}, indent=1, sort_keys=True) + "\n")
        return
    assert name in stored, "no golden curve; `make golden` writes it"
    for row, golden in zip(rows, stored[name], strict=True):
        assert row == pytest.approx(golden, rel=2e-3)
