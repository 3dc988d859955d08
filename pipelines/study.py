"""A study: the record of a search in `study.json` and in MLflow, kept by the driver while trials run.

study.json is complete after every trial, so a search that was cut short still tells what it found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipelines import console
from pipelines.storage import Store
from pipelines.tracking import EXPERIMENT, Tracker

FILE = "study.json"
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One weighting.

    Attributes:
        trial: number, from 0; 0 has the published weights.
        status: `stopped` was ended early by the scheduler because others were better at the same step.
        score: of the objective at the last rung reached; None where none was.
        stderr: its standard error, where the metric gives one.
        step: of that score.
        rungs: every (step, score).
        run, bundle: relative to the study; `bundle` is None unless finished.
    """

    trial: int
    weights: dict[str, float]
    run: str
    status: Status = "running"
    score: float | None = None
    stderr: float | None = None
    step: int = 0
    rungs: list[tuple[int, float]] = field(default_factory=list)
    bundle: str | None = None
    time_s: float = 0.0
    error: str | None = None


class Study:
    """Takes events of trials, prints a line for each that ends, and writes study.json.

    Args:
        about: what is the same for all trials; `metric`, `mode` and `steps` among it.
        total: number of trials to come, for the lines.
    """

    def __init__(self, uri: str, about: Mapping[str, Any], total: int, tracker: Tracker) -> None:
        self.store, self.about, self.total = Store(uri), dict(about), total
        self.trials: dict[str, Trial] = {}
        self._tracker = tracker
        self._children: dict[str, Tracker] = {}
        self._started: dict[str, float] = {}
        self._begun = time.monotonic()
        self.do_nothing: float | None = None

    def start(self, key: str, number: int, weights: Mapping[str, float], run: str) -> None:
        """A trial begins; `key` is what it is called in later events."""
        trial = Trial(number, {name: float(value) for name, value in weights.items()}, run)
        self.trials[key], self._started[key] = trial, time.monotonic()
        tags = {"trial": number, "kind": "trial"}
        child = Tracker(EXPERIMENT, f"trial {number:03d}", tags, self._tracker, uri=self._tracker.uri)
        child.params({"weights": trial.weights})
        self._children[key] = child

    def score(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial reached a rung."""
        trial, metric = self.trials[key], self.about["metric"]
        trial.step, trial.score = int(result["step"]), float(result[metric])
        stderr = result.get(f"{metric}_stderr")
        trial.stderr = None if stderr is None else float(stderr)
        trial.rungs.append((trial.step, trial.score))
        if self.do_nothing is None and result.get("do_nothing") is not None:
            self.do_nothing = float(result["do_nothing"])
        self._children[key].metrics({metric: trial.score}, trial.step)

    def end(self, key: str, error: str | None = None) -> None:
        """A trial is over: failed where there is an `error`, else finished or stopped by the step it reached."""
        trial = self.trials[key]
        trial.time_s = round(time.monotonic() - self._started[key], 2)
        trial.error = error
        trial.status = "failed" if error else "finished" if trial.step >= self.about["steps"] else "stopped"
        if trial.status == "failed":
            trial.score = trial.stderr = None
        elif trial.status == "finished":
            trial.bundle = f"{trial.run}/bundle"
        child = self._children.pop(key)
        child.tags({"status": trial.status, **({"error": error} if error else {})})
        child.close("FAILED" if error else "FINISHED", flush_s=5)
        self.write()
        console.say(self._line(trial))

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best score; None before one is finished."""
        done = [t for t in self.trials.values() if t.status == "finished" and t.score is not None]
        sign = 1 if self.about["mode"] == "min" else -1
        return min(done, key=lambda t: (sign * (t.score or 0.0), t.trial), default=None)

    def document(self) -> dict[str, Any]:
        """Contents of study.json."""
        best = self.best
        trials = sorted(self.trials.values(), key=lambda t: t.trial)
        return {
            "version": 1,
            **self.about,
            "do_nothing": self.do_nothing,
            "wall_s": round(time.monotonic() - self._begun, 2),
            "trial_s": round(sum(t.time_s for t in trials), 2),
            "best": None if best is None else best.trial,
            "trials": [asdict(t) for t in trials],
        }

    def write(self) -> None:
        """Write study.json, replacing the one from before."""
        self.store.write(FILE, json.dumps(self.document(), indent=1).encode())

    def _line(self, trial: Trial) -> str:
        ended = sum(t.status != "running" for t in self.trials.values())
        weights = "  ".join(f"{name} {value:.3g}" for name, value in trial.weights.items())
        if trial.status == "failed":
            outcome = f"failed: {trial.error}"
        else:
            score = "no score" if trial.score is None else f"{self.about['metric']} {trial.score:.4g}"
            outcome = f"{score} {'at the end' if trial.status == 'finished' else f'stopped at step {trial.step}'}"
        mark = " (published)" if trial.trial == 0 else ""
        best = self.best
        leader = f"  best: {best.trial} with {best.score:.4g}" if best is not None else ""
        took = console.duration(trial.time_s)
        return f"trial {trial.trial}{mark}, {ended} of {self.total}: {weights}  {outcome}  {took}{leader}"
