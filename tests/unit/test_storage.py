"""Addresses, local files and the S3 server: what is written is what is read, and every failure is one line."""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from pathlib import Path

import pytest

from models.errors import DataError, I2IError, StorageError
from pipelines import storage, storage_s3
from pipelines.storage import Store, parse_uri
from tests.s3 import KEY, SECRET, S3Server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3")
    return Store(server.uri(f"storage/{tmp_path.name}"))


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data/set", ("file", "data/set")),
        ("/data/set/", ("file", "/data/set")),
        ("file:///data/set", ("file", "/data/set")),
        ("s3://bucket", ("s3", "bucket")),
        ("s3://bucket/", ("s3", "bucket")),
        ("s3://bucket/a/b/", ("s3", "bucket/a/b")),
        ("name with space", ("file", "name with space")),
    ],
)
def test_parse_uri__good(uri: str, expected: tuple[str, str]) -> None:
    assert parse_uri(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        *("s4://b/x", "s3:/b/x", "s3://B_ad/x", "s3://ab/x", "s3://bucket/x ", " data", "", "  ", "https://x/y"),
        *("S3://bucket/x", "s3://bucket/../x", "s3://bucket//x", "s3://bucket/x\n", "gs://bucket/x", "s3://"),
    ],
)
def test_parse_uri__bad_shows_the_string(uri: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_uri(uri)
    assert caught.value.code == "E_URI"
    assert repr(uri) in str(caught.value)


def test_join__adds_one_slash() -> None:
    assert storage.join("s3://b/x/", "y", "/z/") == "s3://b/x/y/z"
    assert storage.join("/", "y") == "/y"
    assert Store("/data").join("a/b") == "/data/a/b"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/x/y", ("s3://b/x", "y")),
        ("a/b.txt", ("a", "b.txt")),
        ("/keys.txt", ("/", "keys.txt")),
        ("keys.txt", (".", "keys.txt")),
    ],
)
def test_split_name__directory_and_name(uri: str, expected: tuple[str, str]) -> None:
    assert storage.split_name(uri) == expected


def test_cache_directory__is_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert storage.cache_directory("shards") == Path("/cache/i2i/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert storage.cache_directory("bundles") == Path("/somebody/.cache/i2i/bundles")


def test_store__reads_what_was_written(store: Store) -> None:
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"two")
    store.write("c", b"")
    assert store.read("a/b.bin") == b"two"
    assert store.read("c") == b""
    assert store.list() == [("a/b.bin", 3), ("c", 0)]
    assert store.list("a") == [("a/b.bin", 3)]
    assert store.list("nothing") == []
    assert store.folders() == ["a"]
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("d")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_store__names_with_spaces_and_letters_of_any_alphabet(store: Store) -> None:
    store.write("name with space/é+%.png", b"x")
    assert store.list() == [("name with space/é+%.png", 1)]
    assert store.read("name with space/é+%.png") == b"x"


def test_write_new__only_the_first_wins(store: Store) -> None:
    assert store.write_new("lease", b"one")
    assert not store.write_new("lease", b"two")
    assert store.read("lease") == b"one"


def test_write_new__is_atomic_on_a_local_disk(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    won: list[int] = []

    def race(number: int) -> None:
        if store.write_new("lease", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lease") == str(won[0]).encode()
    assert store.list() == [("lease", len(str(won[0])))]


def test_upload__files_arrive_whole(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 3_000_000)
    store.upload_file("run/model/big", tmp_path / "big")
    assert store.read("run/model/big") == b"x" * 3_000_000


def test_read__missing_object_is_named(store: Store) -> None:
    with pytest.raises(DataError) as caught:
        store.read("no/such")
    assert caught.value.code == "E_NOT_FOUND"
    assert store.join("no/such") in str(caught.value)


def test_read_verified__tells_expected_and_actual(store: Store) -> None:
    store.write("x", b"good")
    digest = hashlib.sha256(b"good").hexdigest()
    assert store.read_verified("x", digest, 4) == b"good"
    for wrong, size in (("0" * 64, 4), (digest, 5)):
        with pytest.raises(DataError, match=wrong[:12]) as caught:
            store.read_verified("x", wrong, size)
        assert caught.value.code == "E_DIGEST"


def test_list__follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_bytes(b"1")
    (tmp_path / "real/loop").symlink_to(tmp_path / "real")
    (tmp_path / "again").symlink_to(tmp_path / "real")
    assert Store(str(tmp_path)).list() == [("again/x", 1), ("real/x", 1)]


def test_store__travels_without_keys(store: Store) -> None:
    store.write("x", b"1")
    packed = pickle.dumps(store)
    assert SECRET.encode() not in packed
    assert KEY.encode() not in packed
    assert pickle.loads(packed).read("x") == b"1"  # noqa: S301


@pytest.mark.parametrize("call", ["list", "read", "exists", "write", "write_new", "delete"])
def test_s3__missing_bucket_is_one_line(s3: S3Server, call: str) -> None:
    store = Store("s3://no-such-bucket/x")
    with pytest.raises(DataError) as caught:
        getattr(store, call)(*(("x", b"1") if call.startswith("write") else ("x",)))
    assert caught.value.code == "E_BUCKET"
    assert "s3://no-such-bucket/x" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_s3__wrong_and_missing_keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3.uri("storage/keys"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-that-nobody-may-see-in-a-message")
    with pytest.raises(DataError) as caught:
        store.list()
    assert caught.value.code == "E_S3_AUTH"
    assert "wrong-secret" not in str(caught.value)
    assert KEY not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(DataError, match="no S3 credentials found"):
        store.list()


def test_s3__unusable_endpoint(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(DataError) as caught:
        Store("s3://bucket/x").list()
    assert caught.value.code == "E_URI"


def test_s3__silent_endpoint_is_given_up_at_the_deadline(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"nothing answers at http://127\.0\.0\.1:9") as caught:
        Store("s3://bucket/x", deadline_s=1.0).read("x")
    assert "password" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_retry__transient_failures_heal(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3.uri("storage/heal"))
    store.write("x", b"1")
    real, calls = storage_s3.S3.read, []

    def flaky(self: storage_s3.S3, path: str) -> bytes:
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionResetError("reset by peer")
        return real(self, path)

    monkeypatch.setattr(storage_s3.S3, "read", flaky)
    assert store.read("x") == b"1"
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("SlowDown", 503, ("E_STORAGE", True)),
        ("InternalError", 500, ("E_STORAGE", True)),
        ("RequestTimeout", 400, ("E_STORAGE", True)),
        ("AccessDenied", 403, ("E_S3_AUTH", False)),
        ("ExpiredToken", 400, ("E_S3_EXPIRED", False)),
        ("PermanentRedirect", 301, ("E_BUCKET", False)),
        ("InvalidRequest", 400, ("E_STORAGE", False)),
    ],
)
def test_explain__answers_of_s3(code: str, status: int, expected: tuple[str, bool]) -> None:
    from botocore.exceptions import ClientError

    fault = storage_s3.explain(
        ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # pyright: ignore
    )
    assert fault is not None
    assert (fault.code, fault.transient) == expected


def test_explain__our_own_mistakes_are_not_hidden() -> None:
    assert storage_s3.explain(KeyError("x")) is None


def test_local__a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(I2IError) as caught:
        Store(str(tmp_path / "file")).write("x", b"1")
    assert "\n" not in str(caught.value)
