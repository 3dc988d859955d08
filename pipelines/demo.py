"""The whole pipeline on embedded data, with no download, in minutes on two cores: `i2i demo`.

Letters drawn solid are to become letters drawn as outlines, without one pair to learn from: make the images, prepare
them, train a CycleGAN, score it on held-out letters, search its loss weights, promote, serve, translate one
image over HTTP, and write a report. Everything is real, only small.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from pipelines import console, mlflow_env
from pipelines.report import HttpExample, Report, Stage, write_report

MODEL = "letters"
PORT = 8000


@dataclass(frozen=True)
class DemoPlan:
    """Every number of the demo. The times are those of two cores.

    Attributes:
        size: side of the images in pixels.
        per_style, held_out: images a style for training, and each for validation and test.
        steps: of the main training, about two and a half minutes.
        trials, trial_steps: of the search, about one minute.
        trial_limit: validation images a trial is scored on.
    """

    source: str = "solid"
    to: str = "outline"
    size: int = 48
    per_style: int = 2000
    held_out: int = 200
    seed: int = 0
    width: int = 16
    blocks: int = 3
    batch: int = 8
    steps: int = 1400
    trials: int = 6
    trial_steps: int = 160
    trial_limit: int = 200
    grids: int = 5


@dataclass
class _Journal:
    """Times the stages, prints a line for each, and keeps them for the report."""

    total: int
    stages: list[Stage]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """One stage; what is appended to the list is its result."""
        console.say(f"[{len(self.stages) + 1}/{self.total}] {name} …")
        started, result = time.monotonic(), list[str]()
        yield result
        done = Stage(name, time.monotonic() - started, "; ".join(result))
        self.stages.append(done)
        console.say(f"[{len(self.stages)}/{self.total}] {name}: {console.duration(done.seconds)}  {done.result}")


def run_demo(out: str | None = None, keep_serving: bool = False, plan: DemoPlan = DemoPlan()) -> str:
    """Run everything; the path of the report.

    Args:
        out: local directory for what it makes, new or empty; default runs/demo-<UTC>.
        keep_serving: leave the model served, and this process alive, until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: `out` is in a bucket or not empty.
    """
    directory = _directory(out)
    if mlflow_env.tracking_uri() is None:
        os.environ["MLFLOW_TRACKING_URI"] = (
            f"sqlite:///{directory}/mlflow.db"  # there is nothing to promote into without
        )
    import ray

    from deploy import app
    from pipelines import cluster

    joined = ray.is_initialized()
    journal = _Journal(8, [])
    # Ray prints warnings to stdout, where only the result belongs.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            with journal.stage("start Ray") as result:
                cluster.connect()
                result.append(f"{os.cpu_count()} cores")
            report = _run_stages(plan, directory, journal, PORT if keep_serving else 0)
            if keep_serving:
                console.say(f"report: {report}\nserving on until Ctrl-C")
                _wait_for_signal()
        finally:
            app.stop()
            if not joined:
                ray.shutdown()
    return str(report)


def _run_stages(plan: DemoPlan, directory: Path, journal: _Journal, port: int) -> Path:
    from deploy import app
    from pipelines.evaluate import evaluate, save_scores
    from pipelines.prepare import prepare
    from pipelines.promote import promote
    from pipelines.samples import make_samples
    from pipelines.train import train
    from pipelines.tune import tune

    images, data = directory / "images", directory / "data"
    with journal.stage("draw and prepare images") as result:
        styles = (plan.source, plan.to)
        held_out = plan.held_out
        make_samples(
            images, seed=plan.seed, size=plan.size, per_style=plan.per_style, val=held_out, test=held_out, styles=styles
        )
        prepared = prepare(str(images), str(data), licence="made here, from the DejaVu fonts (free licence)")
        counts = {name: sum(splits.values()) for name, splits in prepared.domains.items()}
        result.append(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    with journal.stage("train CycleGAN") as result:
        trained = train(_config(plan, data, directory / "run", plan.steps))
        assert trained.bundle is not None, "a run that came to its end has a bundle"
        result.append(f"{trained.steps:,} steps, weights {str(trained.bundle_sha256)[:12]}")
    with journal.stage("evaluate on unseen letters") as result:
        evaluation = evaluate(trained.bundle, str(data), source=plan.source, to=plan.to)
        save_scores(trained.bundle, evaluation)
        scores = evaluation.to_json()
        result.append(_headline(scores))
    with journal.stage("search loss weights") as result:
        config = _config(plan, data, directory / "study", plan.trial_steps)
        study = tune(config, trials=plan.trials, limit=plan.trial_limit)
        result.append(f"best of {plan.trials} short trials: {study.best}")
    with journal.stage("promote") as result:
        champion = promote(trained.run, MODEL)
        # Trained for a minute only: it is there to be compared, not to be served.
        challenger = promote(study.study, MODEL, alias="challenger", force=True)
        result.append(f"{MODEL} version {champion.version} is champion, {challenger.version} challenger")
    with journal.stage("serve and translate") as result:
        url = app.start(models=[f"{MODEL}@champion"], port=_usable(port))
        picture = sorted((images / "test" / plan.source).glob("*.png"))[0]
        example = _translate(url, picture.read_bytes(), plan.to)
        (directory / "before.png").write_bytes(example.before)
        (directory / "after.png").write_bytes(example.after)
        result.append(f"{example.url} in {example.seconds * 1000:.0f} ms")
    with journal.stage("report"):
        facts = _facts(plan, prepared.digest, str(trained.bundle_sha256), trained.run, study.study)
        report = _report(plan, directory, scores, example, journal, facts)
    return report


def _config(plan: DemoPlan, data: Path, out: Path, steps: int) -> Any:
    from pipelines.config import resolve

    return resolve(
        {
            "name": "cyclegan",
            "out": str(out),
            "data": {"uri": str(data), "domains": (plan.source, plan.to)},
            "system": {"size": plan.size, "width": plan.width, "blocks": plan.blocks},
            "train": {
                "steps": steps,
                "batch": plan.batch,
                "seed": plan.seed,
                "sample_every": max(1, steps // plan.grids),
                "log_every": max(1, steps // 60),
            },
        }
    )


def _translate(url: str, image: bytes, to: str) -> HttpExample:
    """POST the image to the server as a stranger would."""
    address = f"{url}/v1/models/{MODEL}/translate?{urllib.parse.urlencode({'to': to, 'format': 'png'})}"
    request = urllib.request.Request(address, data=image, headers={"Content-Type": "image/png"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # requests to this machine go to no proxy
    started = time.monotonic()
    with opener.open(request, timeout=60) as answer:
        after = answer.read()
        version = answer.headers.get("X-Model-Version", "")
    return HttpExample(image, after, address, time.monotonic() - started, version)


def _headline(scores: dict[str, Any]) -> str:
    parts = []
    for name, ratio in scores["ratios"].items():
        if ratio["value"] is not None:
            parts.append(f"{name} {ratio['value']:.2f} × doing nothing's")
    return ", ".join(parts)


def _report(
    plan: DemoPlan,
    directory: Path,
    scores: dict[str, Any],
    example: HttpExample,
    journal: _Journal,
    facts: dict[str, Any],
) -> Path:
    import json

    lead = (
        f"CycleGAN learnt to turn {plan.source} letters into {plan.to} letters from {plan.per_style:,} unpaired images "
        f"of each, {plan.size} px. Letters of the test split were never seen; only there is the truth known."
    )
    report = Report(
        title=f"Letters: {plan.source} to {plan.to}",
        lead=lead,
        run=directory / "run",
        evaluation=scores,
        study=json.loads((directory / "study/study.json").read_text()),
        http=example,
        stages=journal.stages,
        facts=facts,
    )
    return write_report(report, directory / "report.html")


def _facts(plan: DemoPlan, data_digest: str, weights_digest: str, run: str, study: str) -> dict[str, Any]:
    import ray
    import torch

    return {
        "python, torch, ray": f"{platform.python_version()}, {torch.__version__}, {ray.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "data (sha256 of the index)": data_digest,
        "weights (sha256)": weights_digest,
        "seed": plan.seed,
        "run": run,
        "study": study,
        "MLflow": mlflow_env.shown(str(mlflow_env.tracking_uri())),
    }


def _directory(out: str | None) -> Path:
    directory = Path(out or f"runs/demo-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    if out and "://" in out:
        raise ConfigError(f"the demo writes to a local directory, not to {out}", hint="give --out DIR")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty directory", hint="give another --out, or none")
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def _usable(port: int) -> int:
    """The port if it is free, else 0, for which the server takes one that is."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


def _wait_for_signal() -> None:
    event = threading.Event()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: event.set())
    with contextlib.suppress(KeyboardInterrupt):
        event.wait()
