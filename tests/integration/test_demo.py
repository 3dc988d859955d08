"""The demo with small numbers, through the command: everything runs, and nothing is left running."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import ConfigError
from pipelines.demo import DemoPlan, run_demo

SMALL = DemoPlan(
    size=32,
    per_style=60,
    held_out=12,
    width=4,
    blocks=1,
    batch=4,
    steps=20,
    trials=2,
    trial_steps=8,
    trial_limit=12,
    grids=2,
)
SCRIPT = """
import sys
from pipelines.demo import DemoPlan, run_demo
print(run_demo(out=sys.argv[1], plan=DemoPlan(**eval(sys.argv[2]))))
"""


def session_processes(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:
                    found.append(command)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_demo__runs_to_its_report_and_leaves_nothing_running(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    environment["PYTHONPATH"] = root
    command = [sys.executable, "-c", SCRIPT, "out", repr(dataclasses.asdict(SMALL))]
    # A session of its own, in which whatever is left behind can be found.
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    report = tmp_path / "out/report.html"
    assert out.strip().splitlines() == [str(report)]
    stages = [line for line in err.splitlines() if line.startswith("[8/8] report:")]
    assert len(stages) == 1, err
    assert "Traceback" not in err

    text = report.read_text()
    for title in ("One translation over HTTP", "Samples during training", "Held-out scores", "Curves"):
        assert f"<h2>{title}</h2>" in text
    assert "<h2>Search of the loss weights</h2>" in text
    assert (tmp_path / "out/after.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out/study/study.json").read_text())["best"] in (0, 1)
    assert json.loads((tmp_path / "out/run/bundle/config.json").read_text())["scores"]["l1"] > 0

    for _ in range(100):
        left = session_processes(process.pid)
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def test_demo__refuses_a_directory_that_is_in_use(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty directory"):
        run_demo(str(tmp_path))
    with pytest.raises(ConfigError, match="local directory"):
        run_demo("s3://bucket/demo")
