"""Score a bundle over a held-out split, beside what doing nothing and real images score.

    i2i evaluate runs/cyclegan-…/bundle --data data/letters

One process on one machine: a few hundred to two thousand images take seconds to minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.bundle import CARD, CONFIG, load_bundle, update_scores
from models.errors import ConfigError, NonFiniteLoss
from models.system import Condition, System
from models.translator import Translator
from pipelines.bundle_uri import find_bundle, local_bundle
from pipelines.grid import to_pixels, to_tensor
from pipelines.metrics.direction import METRICS, Direction, Translate, check_metrics, flat, score_generator
from pipelines.metrics.features import load_extractor
from pipelines.metrics.heldout import choose_split, load_directions, protocol
from pipelines.shards import Dataset, open_dataset
from pipelines.storage import Store


@dataclass(frozen=True)
class EvaluateResult:
    """Scores of a bundle; every field is JSON.

    Attributes:
        protocol: how the scores came about: extractor, digests, counts, sizes, seed.
        scores: of the primary direction: `kid_<extractor>`, `kid_<extractor>_stderr`, `frechet_<extractor>`, and `l1`,
            `psnr`, `ssim`, `retrieval_top1` where the split is aligned.
        baselines: `do_nothing`, `random_target`, `real` → the same names.
        ratios: of KID and L1 to doing nothing, each {"value", "stderr"}, None where that is not defined.
        directions: "a->b" → {"scores", "baselines", "ratios"}, the primary direction included.
    """

    bundle: str
    data: str
    split: str
    primary: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    baselines: dict[str, dict[str, float]]
    ratios: dict[str, dict[str, float | None]]
    directions: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As `evaluate --json` prints it."""
        return asdict(self)


def evaluate(
    bundle_uri: str,
    data_uri: str,
    *,
    split: str | None = None,
    metrics: Sequence[str] | None = None,
    features: str = "random_v1",
    source: str | None = None,
    to: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> EvaluateResult:
    """Score a bundle.

    Args:
        bundle_uri: bundle or run directory, local or s3://.
        split: "test" or "val"; None takes "test" where it exists, else "val".
        metrics: names out of `metrics.direction.METRICS`; None means all that apply.
        features: "random_v1", "inception:URI" or "dinov2:URI".
        source, to: restrict the directions; the first of those left is the primary one.
        limit: most held-out images a domain.
        seed: of the random target images.

    Raises:
        BundleError, DataError, ConfigError: naming what is wrong.
        RequestError: the bundle does not translate `source` to `to`.
    """
    chosen = check_metrics(metrics)
    extractor = load_extractor(features, device)
    bundle = load_bundle(local_bundle(bundle_uri), device)
    translator = Translator(bundle, device)
    first = translator.check(Condition(source=source, to=to))
    pairs = [(d["source"], d["to"]) for d in bundle.conditioning["directions"]]
    pairs = [first, *(p for p in pairs if p != first and source in (None, p[0]) and to in (None, p[1]))]
    dataset = open_dataset(data_uri)
    dataset.require(*{domain for pair in pairs for domain in pair})
    chosen_split = choose_split(dataset, sorted({domain for pair in pairs for domain in pair}), split)
    directions = load_directions(
        dataset,
        pairs,
        split=chosen_split,
        size=bundle.size,
        extractor=extractor,
        metrics=chosen,
        limit=limit,
        seed=seed,
    )
    _check_some(directions, chosen, chosen_split)

    def translate(images: np.ndarray, source: str, to: str) -> np.ndarray:
        return np.stack(translator.pixels(list(images), Condition(source=source, to=to)))

    results = score_generator(translate, directions)
    primary = results[directions[0].name]
    return EvaluateResult(
        bundle=bundle_uri,
        data=data_uri,
        split=chosen_split,
        primary=directions[0].name,
        protocol=protocol(directions, chosen_split, bundle.size, seed),
        scores=primary["scores"],
        baselines=primary["baselines"],
        ratios=primary["ratios"],
        directions=results,
    )


def save_scores(bundle_uri: str, result: EvaluateResult) -> None:
    """Write the scores of the primary direction, and how they came about, into a bundle's config.json and card.

    Args:
        bundle_uri: bundle or run directory, local or s3://.

    Raises:
        BundleError, DataError, StorageError: there is no bundle, or it cannot be written.
    """
    about = {"direction": result.primary, "split": result.split, "protocol": result.protocol}
    store = Store(find_bundle(bundle_uri))
    with tempfile.TemporaryDirectory(prefix="i2i-scores-") as scratch:
        Path(scratch, CONFIG).write_bytes(store.read(CONFIG))
        update_scores(scratch, {**result.scores, **about})
        for name in (CARD, CONFIG):
            store.write(name, Path(scratch, name).read_bytes())


class Evaluator:
    """What `train_loop(evaluate=…)` calls: (steps done, system) → flat scores.

    Images, features and baselines are read once, at the first call.

    Args:
        split: "val" by default: what is chosen by looking at "test" cannot be judged by it.
        size: side in pixels of the images.
        metrics: as `evaluate`; None means all that apply.
        primary_only: score the first direction only.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        size: int,
        split: str = "val",
        metrics: Sequence[str] | None = None,
        features: str = "random_v1",
        primary_only: bool = False,
        limit: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.dataset, self.size, self.split, self.limit, self.seed = dataset, size, split, limit, seed
        self.metrics, self.features, self.primary_only = check_metrics(metrics), features, primary_only
        self.device = torch.device(device)
        self._directions: list[Direction] | None = None

    def __call__(self, step: int, system: System) -> dict[str, float]:
        """Scores by name; see `metrics.direction.flat`."""
        return flat(self.results(system))

    def results(self, system: System) -> dict[str, Any]:
        """As `metrics.direction.score_generator`."""
        return score_generator(system_translate(system, self.device), self.directions(system))

    def directions(self, system: System) -> list[Direction]:
        """What is scored: prepared at the first call, the same afterwards."""
        if self._directions is None:
            pairs = [(d["source"], d["to"]) for d in system.conditioning["directions"]]
            self._directions = load_directions(
                self.dataset,
                pairs[:1] if self.primary_only else pairs,
                split=choose_split(self.dataset, system.domains, self.split),
                size=self.size,
                extractor=load_extractor(self.features, self.device),
                metrics=self.metrics,
                limit=self.limit,
                seed=self.seed,
            )
            _check_some(self._directions, self.metrics, self.split)
        return self._directions


def system_translate(system: System, device: str | torch.device = "cpu", batch: int = 16) -> Translate:
    """A system in memory as a `Translate`; images must have sides that it takes.

    Raises (when called):
        NonFiniteLoss: an output is not finite.
    """
    place = torch.device(device)

    def translate(images: np.ndarray, source: str, to: str) -> np.ndarray:
        parts = []
        for start in range(0, len(images), batch):
            with torch.inference_mode():
                x = to_tensor(images[start : start + batch], system.value_range, place)
                y = system.translate(x, Condition(source=source, to=to))
            if not bool(torch.isfinite(y).all()):
                raise NonFiniteLoss(f"the generator {source} to {to} gives numbers that are not finite")
            parts.append(to_pixels(y, system.value_range))
        return np.concatenate(parts)

    return translate


def _check_some(directions: Sequence[Direction], metrics: tuple[str, ...], split: str) -> None:
    """Refuse metrics of which none applies."""
    if not any(d.baselines["do_nothing"].scores for d in directions):
        unpaired = ", ".join(m for m in METRICS if m not in metrics)
        raise ConfigError(
            f"nothing to score: {', '.join(metrics)} compare with the true image of each source, "
            f"and split '{split}' is not aligned",
            code="E_METRIC",
            hint=f"add one of {unpaired}",
        )
