"""The S3 half of pipelines.storage: one boto3 client a process, and what its failures mean to a person."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import DataError

_SINGLE_PUT_BYTES = 1024**3
_lock = threading.Lock()
_clients: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Fault:
    """One failure, for a person: cause, what to check, and whether trying again may help (for `patience_s`)."""

    code: str
    cause: str
    check: str | None
    transient: bool
    patience_s: float = float("inf")


def endpoint() -> str | None:
    """The endpoint given by the environment; None means AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _shown_endpoint() -> str:
    """The endpoint for a message, without a user name and password that an address may hold."""
    return re.sub(r"//[^/@]*@", "//", endpoint() or "AWS S3")


def forget_client() -> None:
    """Make the next call build a new client, which reads its keys again."""
    with _lock:
        _clients.clear()


def _client() -> Any:
    """The client of this process for the present environment (a forked child gets its own)."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")
    key = (os.getpid(), endpoint(), *(os.environ.get(name) for name in names))
    with _lock:
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    from boto3.session import Session
    from botocore.config import Config

    url = endpoint()
    options: dict[str, Any] = {}
    if url is not None:
        # Compatible servers refuse the checksum trailers of newer SDKs, and rarely resolve buckets as host names.
        options = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path"},
        }
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=32,
        retries={"total_max_attempts": 1, "mode": "standard"},  # pipelines.storage retries, with one budget
        **options,
    )
    session = Session()
    try:
        return session.client("s3", endpoint_url=url, config=config, region_name=session.region_name or "us-east-1")
    except ValueError as error:
        raise DataError(
            f"the S3 endpoint is not usable: AWS_ENDPOINT_URL is {_shown_endpoint()!r}",
            code="E_URI",
            hint="e.g. http://127.0.0.1:9000",
        ) from error


class S3:
    """Objects below `bucket/prefix`; every method is one request (a page, for `list`) and may raise botocore errors."""

    def __init__(self, path: str) -> None:
        self.bucket, _, self.prefix = path.partition("/")

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path.strip("/")) if part)

    def read(self, path: str) -> bytes:
        """A whole object."""
        answer = _client().get_object(Bucket=self.bucket, Key=self._key(path))
        data = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise ConnectionError(f"{len(data):,} of {answer['ContentLength']:,} bytes arrived")
        return data

    def size(self, path: str) -> int | None:
        """Bytes of an object; None where there is none."""
        from botocore.exceptions import ClientError

        if not self._key(path):
            return None
        try:
            return _client().head_object(Bucket=self.bucket, Key=self._key(path))["ContentLength"]
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
                raise
        # HEAD has no body, so a missing bucket looks like a missing key: ask again in a way that tells.
        next(self._pages(self._key(path), MaxKeys=1))
        return None

    def write(self, path: str, data: bytes) -> None:
        """Put an object; the server checks its MD5."""
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        _client().put_object(Bucket=self.bucket, Key=self._key(path), Body=data, ContentMD5=digest)

    def write_new(self, path: str, data: bytes) -> bool:
        """Put an object under If-None-Match; False where the server says that it exists."""
        from botocore.exceptions import ClientError

        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            _client().put_object(Bucket=self.bucket, Key=self._key(path), Body=data, ContentMD5=digest, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] in ("PreconditionFailed", "412"):
                return False
            if error.response["Error"]["Code"] == "NotImplemented":
                self.write(path, data)
                return True
            raise
        return True

    def upload(self, path: str, local: Path) -> None:
        """Put a file, in parts where it is larger than 1 GiB."""
        if local.stat().st_size > _SINGLE_PUT_BYTES:
            _client().upload_file(str(local), self.bucket, self._key(path))
            return
        with open(local, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
            file.seek(0)
            _client().put_object(
                Bucket=self.bucket, Key=self._key(path), Body=file, ContentMD5=base64.b64encode(digest).decode()
            )

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """(path, bytes) of all objects below a directory."""
        base = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        items = (item for page in self._pages(f"{base}/" if base else "") for item in page.get("Contents", ()))
        return [(item["Key"][cut:], item["Size"]) for item in items if not item["Key"].endswith("/")]

    def folders(self, prefix: str) -> list[str]:
        """Names of the directories directly below a directory."""
        base = self._key(prefix)
        pages = self._pages(f"{base}/" if base else "", Delimiter="/")
        found = (item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ()))
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def _pages(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = _client().list_objects_v2(Bucket=self.bucket, Prefix=prefix, **options)
            yield page
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        _client().delete_object(Bucket=self.bucket, Key=self._key(path))


def _identity() -> str:
    key = os.environ.get("AWS_ACCESS_KEY_ID", "")
    return f"the key {key[:4]}… of AWS_ACCESS_KEY_ID" if key else "the default AWS credentials"


_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed")
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServiceUnavailable")


def explain(error: BaseException) -> Fault | None:
    """What a failure of a call means; None for what is not a storage failure (a mistake in our own code)."""
    from botocore import exceptions as aws

    where = _shown_endpoint()
    if isinstance(error, aws.ClientError):
        return _explain_answer(error, where)
    if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound)):
        return Fault(
            "E_S3_AUTH", "no S3 credentials found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", transient=False
        )
    if isinstance(error, (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.SSLError)):
        cause = "no TLS connection" if isinstance(error, aws.SSLError) else "nothing answers"
        # A wrong address never heals; a store that restarts does so within seconds.
        return Fault("E_STORAGE", f"{cause} at {where}", "check AWS_ENDPOINT_URL and that it is up", True, 15.0)
    if isinstance(error, (aws.HTTPClientError, aws.IncompleteReadError, OSError)):
        return Fault(
            "E_STORAGE", f"the connection to {where} broke ({type(error).__name__})", "check the network", True
        )
    if isinstance(error, (aws.ParamValidationError, aws.InvalidRegionError)):
        return Fault("E_URI", " ".join(str(error).split())[:160], None, transient=False)
    if isinstance(error, aws.BotoCoreError):
        return Fault("E_STORAGE", type(error).__name__, f"check {where}", transient=True)
    return None


def _explain_answer(error: Any, where: str) -> Fault:
    code = str(error.response.get("Error", {}).get("Code", "?"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return Fault("E_BUCKET", f"there is no such bucket at {where}", "check its name and the endpoint", False)
    if code in ("NoSuchKey", "404", "NotFound"):
        return Fault("E_NOT_FOUND", "no such object", None, transient=False)
    if code in _EXPIRED:
        return Fault("E_S3_EXPIRED", f"{where} says that the credentials have expired", "renew them", transient=False)
    if code in _REFUSED or status in (401, 403):
        return Fault(
            "E_S3_AUTH",
            f"{where} refused {_identity()} ({code})",
            "check the keys and what they allow",
            transient=False,
        )
    if code in _BUSY or status in (429, 503):
        return Fault("E_STORAGE", f"{where} is overloaded ({code})", "try later, or with fewer workers", transient=True)
    if status >= 500 or code in ("RequestTimeout", "IncompleteBody", "BadDigest", "OperationAborted") or status == 409:
        return Fault("E_STORAGE", f"{where} failed ({code}, HTTP {status})", "check the store", transient=True)
    if status == 301 or code in ("PermanentRedirect", "IllegalLocationConstraintException"):
        return Fault("E_BUCKET", f"the bucket is in another region ({code})", "set AWS_DEFAULT_REGION", transient=False)
    return Fault(
        "E_STORAGE", f"{where} refused the request ({code}, HTTP {status})", "check the address", transient=False
    )
