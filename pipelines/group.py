"""A group of Ray Train workers around the training loop, seen from the driver."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from models import errors
from models.errors import CheckpointError, ConfigError, I2IError, NonFiniteLoss, UserError
from pipelines import console
from pipelines.config import RunConfig
from pipelines.context import RayContext
from pipelines.loop import train_loop
from pipelines.mailbox import Mailbox

_POLL_S = 0.5
_MAX_FAILURES = 3

Watch = Callable[[Mapping[str, Any]], None]


def train_on_ray(config: RunConfig, watch: Watch, stop: threading.Event) -> None:
    """Run the loop on `config.train.workers` workers; lost ones are replaced, and the run goes on from its checkpoint.

    Args:
        watch: called with each event of the loop.
        stop: set to ask for a checkpoint and an end.

    Raises:
        I2IError: what ended the run; mistakes of the user's and divergence are not tried again.
    """
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node: losing a worker's node must not lose the way to report.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    finished = threading.Event()
    poller = threading.Thread(target=_poll, args=(mailbox, watch, stop, finished), name="i2i-progress", daemon=True)
    # Ray Train's own state is scratch: what a run resumes from is in our run directory.
    with tempfile.TemporaryDirectory(prefix="i2i-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.to_yaml(), "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=config.train.workers,
                use_gpu=config.train.gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if config.train.gpu else {})},
            ),
            run_config=RayRunConfig(
                name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=_MAX_FAILURES)
            ),
        )
        poller.start()
        try:
            with _keyboard_interrupt():
                trainer.fit()
            _raise_failure(mailbox)
        except I2IError:
            raise
        except Exception as error:
            _raise_failure(mailbox)
            raise _cause(error) from error
        finally:
            finished.set()
            poller.join(timeout=10)
            ray.kill(mailbox)


def _worker(settings: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    import ray
    import ray.train

    mailbox = settings["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # Ray tries again whatever the error was; this one would come again
    config = RunConfig.from_yaml(settings["config"])
    try:
        result = train_loop(config, RayContext(mailbox, config.train.readers))
    except (UserError, NonFiniteLoss, CheckpointError) as error:
        ray.get(mailbox.fail.remote(type(error).__name__, error.message, error.code, error.hint))
        raise
    ray.train.report({"steps": result.steps})


def _raise_failure(mailbox: Any) -> None:
    """Raise what a worker noted as an error that another attempt would meet again."""
    import ray

    noted = ray.get(mailbox.failure.remote())
    if noted is not None:
        kind, message, code, hint = noted
        raise getattr(errors, kind)(message, code=code, hint=hint)


def _poll(mailbox: Any, watch: Watch, stop: threading.Event, finished: threading.Event) -> None:
    import ray
    from ray.exceptions import RayError

    asked = warned = False
    while True:
        last = finished.wait(_POLL_S)
        try:
            if stop.is_set() and not asked:
                ray.get(mailbox.ask_to_stop.remote(), timeout=30)
                asked = True
            for event in ray.get(mailbox.take.remote(), timeout=30):
                watch(event)
        except RayError as error:
            if not warned:
                console.warn(f"progress cannot be shown at present: {type(error).__name__}")
            warned = True
        if last:
            return


def check_resources(config: RunConfig) -> None:
    """Refuse a run that the cluster has no room for; Ray would wait for ever.

    Raises:
        ConfigError: what is needed and what is there.
    """
    import ray

    train, have = config.train, ray.cluster_resources()
    if train.gpu and have.get("GPU", 0) < train.workers:
        raise ConfigError(
            f"{train.workers} workers need {train.workers} GPUs, the cluster has {have.get('GPU', 0):.0f}",
            hint="lower --workers, or train with --cpu",
        )
    wanted = train.workers * (1 + 0.5 * train.readers)
    if have.get("CPU", 0) < wanted:
        raise ConfigError(
            f"{train.workers} workers with their readers need {wanted:.0f} CPUs, "
            f"the cluster has {have.get('CPU', 0):.0f}",
            hint="lower --workers",
        )


def _cause(error: BaseException) -> BaseException:
    """The error of ours among what Ray raises, else the error itself in one line."""
    waiting, seen = [error], set()
    while waiting:
        now = waiting.pop(0)
        if isinstance(now, I2IError):
            return now
        seen.add(id(now))
        inner = [*(getattr(now, "worker_failures", None) or {}).values(), getattr(now, "cause", None), now.__cause__]
        waiting += [e for e in inner if isinstance(e, BaseException) and id(e) not in seen]
    text = str(error).strip() or type(error).__name__
    return I2IError(f"training failed: {text.splitlines()[-1]}", hint="--verbose shows Ray's own log")


@contextmanager
def _keyboard_interrupt() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Ray Train puts a handler of its own in place, which exits with status 0, and leaves it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
