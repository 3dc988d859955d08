from __future__ import annotations

import json

import numpy as np
import pytest

from models.errors import ConfigError
from pipelines.metrics.direction import (
    METRICS,
    check_metrics,
    flat,
    prepare_direction,
    score_direction,
    score_generator,
)
from pipelines.metrics.features import RandomV1
from pipelines.metrics.reference import make_reference


def _dots(seed: int, n: int, value: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = np.full((n, 32, 32, 3), 255, np.uint8)
    for image in images:
        y, x = rng.integers(0, 24, 2)
        image[y : y + 8, x : x + 8] = value
    return images


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    return _dots(0, 60, 0)


@pytest.fixture(scope="module")
def reference(train):
    extractor = RandomV1()
    return make_reference("black", extractor, extractor(train))


def _direction(train, reference, *, aligned=True, metrics=METRICS):
    rows = np.arange(0, 40, 2)
    return prepare_direction(
        "grey",
        "black",
        sources=_dots(1, 30, 128),
        real=_dots(1, 30, 0),
        aligned=aligned,
        reference=reference,
        random_rows=rows,
        random_images=train[rows],
        metrics=metrics,
    )


def test_score_direction__perfect_and_idle_generators(train, reference):
    direction = _direction(train, reference)
    perfect, idle = score_direction(_dots(1, 30, 0), direction), score_direction(direction.sources, direction)
    assert perfect["scores"]["l1"] == 0
    assert perfect["scores"]["retrieval_top1"] == 1
    assert perfect["ratios"]["kid_random_v1"]["value"] < 0.05
    assert perfect["scores"]["kid_random_v1"] == perfect["baselines"]["real"]["kid_random_v1"]
    assert idle["ratios"]["kid_random_v1"] == {"value": pytest.approx(1), "stderr": pytest.approx(0, abs=1e-6)}
    assert idle["ratios"]["l1"]["value"] == pytest.approx(1)
    assert idle["scores"] == idle["baselines"]["do_nothing"]
    assert json.loads(json.dumps(idle)) == idle


def test_score_direction__random_target_is_near_in_kid_and_far_in_l1(train, reference):
    baselines = score_direction(_dots(1, 30, 0), _direction(train, reference))["baselines"]
    random, nothing = baselines["random_target"], baselines["do_nothing"]
    assert abs(random["kid_random_v1"]) < 0.1 * nothing["kid_random_v1"]
    assert random["l1"] > 2 * nothing["l1"]
    assert random.keys() == nothing.keys()


def test_score_direction__without_alignment_there_are_no_paired_scores(train, reference):
    result = score_direction(_dots(1, 30, 0), _direction(train, reference, aligned=False))
    assert set(result["scores"]) == {"kid_random_v1", "kid_random_v1_stderr", "frechet_random_v1"}
    assert set(result["ratios"]) == {"kid_random_v1"}


def test_score_direction__only_what_was_asked_for(train, reference):
    direction = _direction(train, reference, metrics=("l1",))
    assert set(score_direction(direction.sources, direction)["scores"]) == {"l1"}


def test_score_direction__ratio_is_undefined_where_doing_nothing_is_perfect(train, reference):
    rows = np.arange(10)
    same = prepare_direction(
        "black",
        "black",
        sources=train[:10],
        real=train[:10],
        aligned=True,
        reference=reference,
        random_rows=rows,
        random_images=train[rows],
        metrics=("l1",),
    )
    assert score_direction(train[:10], same)["ratios"]["l1"] == {"value": None, "stderr": None}


def test_score_generator__batches_and_directions(train, reference):
    seen = []

    def translate(images, source, to):
        seen.append((len(images), source, to))
        return images // 129 * 255

    results = score_generator(translate, [_direction(train, reference)], batch=20)
    assert seen == [(20, "grey", "black"), (10, "grey", "black")]
    assert results["grey->black"]["scores"]["l1"] < 0.05


def test_score_direction__wrong_number_of_outputs(train, reference):
    with pytest.raises(ValueError, match="do not match"):
        score_direction(_dots(1, 29, 0), _direction(train, reference))


def test_flat__primary_direction_without_prefix():
    result = {"scores": {"l1": 0.5}, "baselines": {}, "ratios": {"l1": {"value": 0.7, "stderr": 0.1}}}
    assert flat({"a->b": result, "b->a": result}) == {
        "l1": 0.5,
        "l1_ratio": 0.7,
        "b->a/l1": 0.5,
        "b->a/l1_ratio": 0.7,
    }


def test_check_metrics__aliases_suffixes_and_mistakes():
    assert check_metrics(None) == METRICS
    assert check_metrics(["fid", "l1", "kid_random_v1"]) == ("kid", "frechet", "l1")
    with pytest.raises(ConfigError, match="unknown metric 'kidd'; did you mean 'kid'"):
        check_metrics(["kidd"])
    with pytest.raises(ConfigError, match="no metric"):
        check_metrics([])
