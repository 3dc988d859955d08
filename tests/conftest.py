"""Fixtures that several suites share: one S3 server and one Ray runtime for the whole session."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests import s3 as s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """A real S3 server; the AWS_* variables of this process point to it until the session ends."""
    server = s3_server.start(tmp_path_factory.mktemp("s3") / "buckets")
    before = dict(os.environ)
    os.environ.update(server.env)
    yield server
    for name in server.env:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    server.stop()


@pytest.fixture(scope="session")
def ray_session(s3: s3_server.S3Server) -> Iterator[None]:
    """One Ray runtime for all tests; started after the S3 server, so that its workers know the address."""
    import ray

    from pipelines import cluster

    cluster.connect()
    yield
    ray.shutdown()
    time.sleep(0.2)
