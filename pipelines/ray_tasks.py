"""The work of `prepare` on Ray: many small tasks, plain values in and out, one readable error."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from models import errors
from models.errors import I2IError, StorageError
from pipelines import ingest

_TASKS: dict[str, Callable[..., Any]] = {"check_files": ingest.check_files, "write_shard": ingest.write_shard}
_DOING = {"check_files": "checking images", "write_shard": "writing a shard"}


def run_tasks(function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Run `function(**task)` for each task by Ray Data; yield the results as they come, in any order."""
    import ray
    from ray.data import TaskPoolStrategy
    from ray.exceptions import RayError

    local = "RAY_ADDRESS" not in os.environ
    cpus = (os.cpu_count() or 1) if local else int(ray.cluster_resources().get("CPU", 1))
    blocks = [pa.table({"task": [json.dumps(task)]}) for task in tasks]
    with warnings.catch_warnings():
        # `max_retries` has no other way in yet; without it a task whose worker dies is tried for ever.
        warnings.simplefilter("ignore")
        dataset = ray.data.from_arrow(blocks).map_batches(
            _run_block,  # pyright: ignore[reportArgumentType]
            fn_args=[function.__name__],
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5,
            compute=TaskPoolStrategy(max(1, min(cpus, len(blocks)))),
            max_retries=2,
        )
    # A dead worker is reported below, in one line; Ray Data would print its own stack first.
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for text in block["result"].to_pylist():  # pyright: ignore[reportAttributeAccessIssue]
                answer = json.loads(text)
                if "error" in answer:
                    raise _rebuilt(*answer["error"])
                yield answer["value"]
    except RayError as error:
        raise StorageError(
            f"a worker died while it was {_DOING[function.__name__]} ({type(error).__name__}), three times",
            code="E_IMG_DECODER",
            hint="an image may crash its decoder, or memory may be short; halve the source to find it",
        ) from error
    finally:
        logger.setLevel(level)


def _run_block(table: pa.Table, name: str) -> pa.Table:
    """What a Ray task runs: JSON in, JSON out, so that nothing of ours is pickled; our errors travel as values."""
    results = []
    for text in table["task"].to_pylist():
        try:
            results.append({"value": _TASKS[name](**json.loads(text))})
        except I2IError as error:
            results.append({"error": [type(error).__name__, error.message, error.code, error.hint]})
    return pa.table({"result": [json.dumps(result) for result in results]})


def _rebuilt(kind: str, message: str, code: str, hint: str | None) -> I2IError:
    return getattr(errors, kind)(message, code=code, hint=hint)
