"""What works on this machine: `i2i doctor [--data URI]`.

Every line is *ok*, *warn* (something is missing that some commands need) or *FAIL* (nothing will run), with what to do.
Things are tried, not guessed: Ray is started and runs a task, MLflow takes a run, the dataset's first shard is read.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines import mlflow_env

Status = Literal["ok", "warn", "FAIL"]
GIB = 1024**3
SERVE_PORT, DASHBOARD_PORT = 8000, 8265


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, and what to do (empty where nothing)."""

    name: str
    status: Status
    found: str
    advice: str = ""


def doctor(data: str | None = None, start_ray: bool = True) -> list[Check]:
    """Look at everything; takes about 15 seconds, most of it for Ray.

    Args:
        data: also open this dataset and read one shard of it.
        start_ray: start (or join) Ray and run one task.
    """
    looks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _packages,
        _torch,
        _machine,
        _disk,
        _mlflow,
        _s3,
        _ports,
        _browser,
    ]
    if start_ray:
        looks.insert(5, _ray)
    if data is not None:
        looks.append(lambda: _data(data))
    checks: list[Check] = []
    for look in looks:
        name = getattr(look, "__name__", "data").strip("_")
        try:
            checks.extend(look())
        except Exception as error:  # noqa: BLE001  a doctor who faints helps nobody
            checks.append(Check(name, "FAIL", f"{type(error).__name__}: {mlflow_env.brief(error)}"))
    return checks


def failed(checks: list[Check]) -> bool:
    """Whether any line says FAIL; the command then exits 1."""
    return any(check.status == "FAIL" for check in checks)


def render(checks: list[Check]) -> str:
    """The lines as a plain-text table, with a summary as the last line."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<4}  {'':<{width}}  → {check.advice}")
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "FAIL")}
    lines.append(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} failed")
    return "\n".join(lines)


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check("python", "ok" if good else "FAIL", found, "" if good else "use Python 3.11, 3.12 or 3.13")


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("i2i") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if not project.exists():
            return []
        return tomllib.loads(project.read_text())["project"]["dependencies"]


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    missing, pinned, odd = [], [], []
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        exact = str(requirement.specifier).startswith("==")
        if not requirement.specifier.contains(version, prereleases=True):
            (missing if exact else odd).append(f"{requirement.name} {version} (wanted {requirement.specifier})")
        elif exact:
            pinned.append(f"{requirement.name} {version}")
    install = "pip install -c constraints.txt -e ."
    if missing:
        yield Check("packages", "FAIL", f"missing or not at their pin: {', '.join(missing)}", install)
    elif odd:
        yield Check("packages", "warn", f"outside the tested ranges: {', '.join(odd)}", install)
    else:
        yield Check("packages", "ok", ", ".join(pinned) or "no list of requirements found")


def _torch() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use --precision fp32"
        yield Check("device", "ok", f"{torch.cuda.device_count()} × {', '.join(sorted(names))}, {bf16}")
        return
    flags = _cpu_flags()
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    fast = bool({"amx_bf16", "avx512_bf16"} & flags)
    found = f"CPU ({units[0] if units else platform.machine()}); bf16 {'in hardware' if fast else 'emulated'}"
    if Path("/proc/driver/nvidia/version").exists():
        advice = "an NVIDIA driver is here, but this torch has no CUDA: install the CUDA build of the same version"
        yield Check("device", "warn", found, advice)
    else:
        yield Check("device", "ok", found, "" if fast else "--precision fp32 is as fast as bf16 here")


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return set(line.split())


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cores", "ok" if cores >= 2 else "warn", str(cores), "" if cores >= 2 else "everything shares one core")
    memory = _memory_bytes()
    enough = memory >= 6 * GIB
    advice = "" if enough else "the demo needs about 6 GiB: close other programs, or take fewer --workers"
    yield Check("memory", "ok" if enough else "warn", f"{memory / GIB:.1f} GiB", advice)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
        enough = shared >= 0.5 * GIB
        advice = "" if enough else "Ray's object store falls back to disk; in Docker use --shm-size=2g"
        yield Check("/dev/shm", "ok" if enough else "warn", f"{shared / GIB:.1f} GiB free", advice)


def _memory_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return memory


def _disk() -> Iterator[Check]:
    for name, path in (("disk here", Path.cwd()), ("disk of /tmp", Path("/tmp"))):
        if not path.is_dir():
            continue
        usage = shutil.disk_usage(path)
        status: Status = "ok" if usage.free > 5 * GIB else "warn" if usage.free > GIB else "FAIL"
        advice = "" if status == "ok" else f"free some space below {path}"
        yield Check(name, status, f"{usage.free / GIB:.0f} GiB free", advice)


def _ray() -> Iterator[Check]:
    import ray

    from pipelines import cluster

    joined, started = ray.is_initialized(), time.monotonic()
    where = os.environ.get("RAY_ADDRESS")
    try:
        cluster.connect()
        answer = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
        resources = ray.cluster_resources()
    except Exception as error:  # noqa: BLE001
        advice = "unset RAY_ADDRESS to start one here" if where else "look into /tmp/ray/session_latest/logs"
        yield Check("ray", "FAIL", f"no task could be run: {mlflow_env.brief(error)}", advice)
        return
    finally:
        if not joined and ray.is_initialized():
            ray.shutdown()
    assert answer != os.getpid(), "a Ray task ran in the driver"
    size = f"{resources.get('CPU', 0):.0f} CPU and {resources.get('GPU', 0):.0f} GPU slots"
    yield Check(
        "ray", "ok", f"ran a task after {time.monotonic() - started:.0f} s, {size}{' at ' + where if where else ''}"
    )


def _mlflow() -> Iterator[Check]:
    uri = mlflow_env.tracking_uri()
    if uri is None:
        yield Check("mlflow", "warn", "switched off (MLFLOW_TRACKING_URI=none)", "promote and serve --model need it")
        return
    name = "doctor"
    try:
        client = mlflow_env.client(uri)
        run = client.create_run(mlflow_env.experiment_id(client, name, uri), run_name=name)
        client.delete_run(run.info.run_id)
    except Exception as error:  # noqa: BLE001
        advice = "start the server, or unset MLFLOW_TRACKING_URI for a file in ./runs; training works without"
        yield Check("mlflow", "warn", f"{mlflow_env.shown(uri)} took no run: {mlflow_env.brief(error)}", advice)
        return
    yield Check("mlflow", "ok", f"{mlflow_env.shown(uri)} is writable")


def _s3() -> Iterator[Check]:
    import botocore.session

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    where = mlflow_env.shown(endpoint) if endpoint else "Amazon's own endpoint"
    hints = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_SHARED_CREDENTIALS_FILE")
    if endpoint is None and not any(map(os.environ.get, hints)) and not Path("~/.aws").expanduser().is_dir():
        # Asking further would wait for a cloud's metadata service.
        yield Check("s3", "ok", "not configured; only s3:// addresses need it (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …)")
        return
    credentials = botocore.session.get_session().get_credentials()
    if credentials is None:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        yield Check("s3", "warn", f"{where}; no identity found", advice)
        return
    yield Check("s3", "ok", f"{where}; identity from: {credentials.method}")


def _data(uri: str) -> Iterator[Check]:
    from pipelines.shards import open_dataset, read_shard
    from pipelines.storage import Store

    dataset = open_dataset(uri)
    manifest = dataset.manifest
    split = next(iter(manifest.splits))
    domain = next(iter(manifest.splits[split]))
    first = dataset.shards(domain, split)[0]
    started = time.monotonic()
    raw = Store(uri).read_verified(first.uri, first.sha256, first.bytes)
    rows = read_shard(raw).num_rows
    speed = len(raw) / 1e6 / max(time.monotonic() - started, 1e-6)
    counts = ", ".join(f"{name} {manifest.count(name, split)}" for name in manifest.splits[split])
    yield Check("data", "ok", f"{uri}: {split}: {counts}; first shard ({rows} images) verified at {speed:.0f} MB/s")


def _ports() -> Iterator[Check]:
    for port, use in ((SERVE_PORT, "i2i serve"), (DASHBOARD_PORT, "Ray's dashboard")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                advice = "use i2i serve --port" if port == SERVE_PORT else "Ray takes the next free one"
                yield Check(f"port {port}", "warn", f"in use ({use})", advice)
            else:
                yield Check(f"port {port}", "ok", f"free ({use})")


def _browser() -> Iterator[Check]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    yield Check("browser", "ok", found or "no chromium; only the browser tests use it")
