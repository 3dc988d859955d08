"""Start or join Ray, once a command, quietly and with settings that suit the machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import ConfigError

# Measured: these bring the teardown of a small training run from 5 s to 2 s.
_ENVIRONMENT = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    # Ray lowers the priority of its workers; beside other programs a training step then waits on its own threads.
    "RAY_worker_niceness": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_usage_stats_enabled": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_memory_monitor_refresh_ms": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Starting many workers at once is no fault on a small machine; Ray warns of it on stdout.
    "RAY_worker_maximum_startup_concurrency": "8",
}

# Of every worker. Threads that wait for each other sleep instead of burning the core another process needs, and freed
# memory is kept: measured on two cores, the training step costs 15 % less processor time.
_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}


def connect(*, verbose: bool = False) -> None:
    """Join the cluster at RAY_ADDRESS, else start a local one; a second call does nothing.

    A local cluster is told of more logical CPUs than there are: workers, readers and a served model share two cores,
    and the number of threads is set by this project, not by Ray's accounting.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS, or none could be started here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data  # sets log levels of its own when it is first imported

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    address = os.environ.get("RAY_ADDRESS")
    root = str(Path(__file__).resolve().parent.parent)
    # Workers must find these packages wherever the command was started.
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    options: dict[str, Any] = {
        "address": address or "local",
        "runtime_env": {"env_vars": {"PYTHONPATH": path, **_WORKER_ENVIRONMENT}},
        "log_to_driver": verbose,
        "logging_level": level,
    }
    if not address:
        options |= {
            "num_cpus": max(8, 4 * (os.cpu_count() or 1)),
            "include_dashboard": True,  # Ray Train asks it for the state of its controller
            "dashboard_host": "127.0.0.1",
            "object_store_memory": _object_store_bytes(),
        }
    with _sigterm_kept():
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"there is no Ray cluster at {address}" if address else "Ray could not be started on this machine"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = "check RAY_ADDRESS, or unset it" if address else "`i2i doctor` looks at what it needs"
            raise ConfigError(f"{where}: {reason}", code="E_CLUSTER", hint=hint) from error
    ray.data.DataContext.get_current().enable_progress_bars = False


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM; one that a command has set before goes on to count."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before):
        signal.signal(signal.SIGTERM, before)


def _object_store_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    limit = shared.f_bavail * shared.f_frsize * 0.8 if shared else memory
    return int(min(memory * 0.2, limit, 2 * 1024**3))
