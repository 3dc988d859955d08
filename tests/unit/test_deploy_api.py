from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.api import Pool, make_api
from deploy.limits import PUBLIC, Limits, LimitsMiddleware
from deploy.model import HostedModel, failure
from models import codec
from models.bundle import save_bundle
from models.errors import I2IError, RequestError
from models.system import Condition
from tests.tiny_system import Tiny, register

TOKEN = "correct-horse-battery-staple"
CANARY = "canary-7f3a"


class Client:
    """The app in this process, without a socket."""

    def __init__(self, app: Any, host: str = "localhost", address: str = "127.0.0.1") -> None:
        self.app, self.base_url, self.address = app, f"http://{host}", address

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=(self.address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=self.base_url) as client:
            return await client.request(method, path, **options)


class Broken:
    """A model whose exceptions must show nowhere."""

    async def describe(self) -> dict[str, Any]:
        raise RuntimeError(CANARY)

    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        raise RuntimeError(CANARY)


class Slow(Broken):
    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        await asyncio.sleep(30)
        return {}


class Full(Broken):
    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        return failure(RequestError("too many requests are waiting", code="E_QUEUE"))


def host(tmp_path: Path, monkeypatch) -> HostedModel:
    register(monkeypatch)
    system = Tiny(Tiny.Config(), ("photo", "drawing")).invert()
    save_bundle(tmp_path / "run" / "bundle", system, size=32, step=3, ema=False)
    uri = str(tmp_path / "run" / "bundle")
    return HostedModel({"name": "tiny", "uri": uri, "alias": None}, {"bundles": [uri], "max_pixels": 100_000})


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> HostedModel:
    return host(tmp_path, monkeypatch)


@pytest.fixture
def client(tiny):
    pool = Pool({"tiny": tiny})
    asyncio.run(pool.refresh())
    return Client(make_api(pool, Limits(max_body_bytes=200_000), watch=False))


def picture(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


PNG = codec.encode(picture())
URL = "/v1/models/tiny/translate"


def error(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "hint"}
    return body["error"]["code"]


def test_translate__body(client):
    answer = client.post(URL + "?to=drawing", content=PNG, headers={"X-Request-Id": "abc-1"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert np.array_equal(codec.decode(answer.content), 255 - picture())
    assert answer.headers["x-request-id"] == "abc-1" and len(answer.headers["x-model-version"]) == 12
    stages = [part.split(";")[0].strip() for part in answer.headers["server-timing"].split(",")]
    assert stages == ["decode", "queue", "model", "encode", "total"]


def test_translate__both_directions_and_formats(client):
    back = client.post(URL + "?to=photo&format=webp", content=PNG)
    assert back.headers["content-type"] == "image/webp" and codec.decode(back.content).shape == (40, 50, 3)
    lossy = client.post(URL + "?source=photo&format=jpeg", content=PNG)
    assert lossy.headers["content-type"] == "image/jpeg" and codec.decode(lossy.content).shape == (40, 50, 3)


def test_translate__form(client):
    answer = client.post(URL, files={"image": ("a.png", PNG, "image/png")})
    assert np.array_equal(codec.decode(answer.content), 255 - picture())


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("to=foto", "E_DOMAIN"),
        ("source=drawing&to=drawing", "E_DOMAIN"),
        ("seed=1", "E_PARAMETER"),
        ("seed=-1", "E_PARAMETER"),
        ("seed=1e400", "E_PARAMETER"),
        ("strength=nan", "E_PARAMETER"),
        ("strength=0.5", "E_PARAMETER"),
        ("attributes=Smiling=1", "E_ATTRIBUTE"),
        ("attributes=Smiling=much", "E_ATTRIBUTE"),
        ("n=0", "E_PARAMETER"),
        ("n=-1", "E_PARAMETER"),
        ("n=1000000000", "E_PARAMETER"),
        ("n=2", "E_PARAMETER"),
        ("format=gif", "E_PARAMETER"),
        ("too=drawing", "E_PARAMETER"),
        ("to=drawing&to=photo", "E_PARAMETER"),
    ],
)
def test_translate__wrong_parameters_are_422(client, query, code):
    assert error(client.post(f"{URL}?{query}", content=PNG), 422) == code


def test_translate__unknown_parameter_names_the_nearest(client):
    answer = client.post(f"{URL}?sorce=photo", content=PNG)
    assert "did you mean 'source'" in answer.json()["error"]["hint"]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "E_REQ_EMPTY"),
        (b"<html>not found</html>", 415, "E_IMG_FORMAT"),
        (PNG[: len(PNG) // 2], 422, "E_IMG_TRUNCATED"),
        (codec.encode(picture(8, 8)), 422, "E_IMG_SIZE"),
        (codec.encode(np.zeros((400, 400, 3), np.uint8)), 413, "E_IMG_PIXELS"),
        (bytes(300_000), 413, "E_BODY_SIZE"),
    ],
)
def test_translate__bad_bodies(client, data, status, code):
    assert error(client.post(URL, content=data), status) == code


def test_translate__body_is_counted_whatever_the_headers_say(client):
    async def endless():
        for _ in range(1000):
            yield bytes(10_000)

    assert error(client.post(URL, content=endless()), 413) == "E_BODY_SIZE"


@pytest.mark.parametrize(
    ("files", "data", "status", "code"),
    [
        ([("picture", PNG)], None, 422, "E_PARAMETER"),
        ([("image", PNG), ("image", PNG)], None, 422, "E_PARAMETER"),
        ([("image", PNG), ("reference", PNG)], None, 422, "E_PARAMETER"),
        ([("image", b"")], None, 400, "E_REQ_EMPTY"),
        ([("image", PNG)], {"url": "http://169.254.169.254/"}, 400, "E_URL_UNSUPPORTED"),
        ([("reference", PNG)], {"image": "text"}, 422, "E_PARAMETER"),
        ([("image", PNG)] * 20, None, 400, "E_REQ_FORM"),
    ],
)
def test_translate__bad_forms(client, files, data, status, code):
    forms = [(name, ("x.png", content, "image/png")) for name, content in files]
    assert error(client.post(URL, files=forms, data=data), status) == code


def test_translate__addresses_are_not_fetched(client):
    assert error(client.post(f"{URL}?url=http://169.254.169.254/", content=PNG), 400) == "E_URL_UNSUPPORTED"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "%2e%2e%2fetc", "a%00b", "a" * 300, "%F0%9F%99%82", "UPPER", "tiny%0a"]
)
def test_translate__names_by_rule(client, name):
    answer = client.post(f"/v1/models/{name}/translate", content=PNG)
    assert answer.status_code in (400, 404) and answer.json()["error"]["code"] in ("E_NAME", "E_NOT_FOUND")


def test_translate__unknown_model(client):
    assert error(client.post("/v1/models/tinny/translate", content=PNG), 404) == "E_MODEL_UNKNOWN"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", URL, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nothing", 404),
        ("GET", "//", 404),
        ("GET", "/..;/", 404),
    ],
)
def test_routes__what_is_not_there(client, method, path, status):
    error(client.request(method, f"http://localhost{path}"), status)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Encoding": "gzip"}, 415, "E_ENCODING"),
        ({"X-Request-Id": "a b"}, 400, "E_HEADER"),
        ({"X-Big": "x" * 20_000}, 431, "E_HEADERS_SIZE"),
        ({"Content-Length": "5", "Transfer-Encoding": "chunked"}, 400, "E_HEADER"),
        ({"Host": "evil.example"}, 400, "E_HOST"),
    ],
)
def test_headers__refused(client, headers, status, code):
    answer = client.post(URL, content=PNG, headers=headers)
    assert error(answer, status) == code
    assert answer.headers["x-request-id"]


def test_models__what_may_be_asked(client):
    (model,) = client.get("/v1/models").json()["models"]
    assert model["name"] == "tiny" and model["system"] == "tiny" and model["ready"] is True
    assert model["domains"] == ["photo", "drawing"]
    assert model["conditioning"]["directions"][0] == {"source": "photo", "to": "drawing"}


def test_probes(client):
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").status_code == 200


def test_readyz__not_before_every_model_answered(tiny):
    pool = Pool({"tiny": tiny, "broken": Broken()})
    client = Client(make_api(pool, Limits(), watch=False))
    assert client.get("/readyz").status_code == 503
    asyncio.run(pool.refresh())
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["models"] == {"tiny": "ready", "broken": "it does not answer"}
    assert CANARY not in client.get("/v1/models").text


def one(model: Any, limits: Limits) -> Client:
    return Client(make_api(Pool({"tiny": model}), limits, watch=False))


def test_errors__show_no_internals():
    answer = one(Broken(), Limits()).post(URL, content=PNG)
    assert error(answer, 500) == "E_INTERNAL"
    assert CANARY not in answer.text + str(answer.headers)


def test_errors__not_the_callers_fault_lose_their_text():
    assert CANARY not in json.dumps(failure(I2IError(CANARY)))


def test_timeout__no_header_switches_it_off():
    client = one(Slow(), Limits(timeout_s=0.2))
    for headers in ({}, {"x-request-timeout-seconds": "0"}, {"x-request-disconnect-disabled": "?1"}):
        answer = client.post(URL, content=PNG, headers=headers)
        assert error(answer, 408) == "E_TIMEOUT"


def test_queue__full_is_429_with_retry_after():
    answer = one(Full(), Limits()).post(URL, content=PNG)
    assert error(answer, 429) == "E_QUEUE" and answer.headers["retry-after"] == "1"


def test_buffer__all_bodies_together_are_bounded(tiny):
    client = one(tiny, Limits(max_buffered_bytes=1000))
    assert error(client.post(URL, content=PNG), 429) == "E_QUEUE"
    assert error(client.post(URL, content=bytes(500)), 415) == "E_IMG_FORMAT"  # and given back


@pytest.fixture
def guarded(tiny):
    limits = Limits(token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
    return Client(make_api(Pool({"tiny": tiny}), limits, watch=False), "any.example", "10.1.2.3")


def test_token__every_route_but_the_public_ones(guarded):
    app = guarded.app.app
    paths = {path for route in app.routes if (path := getattr(route, "path", None))}
    assert paths >= PUBLIC and len(paths - PUBLIC) >= 3
    for path in paths - PUBLIC:
        for method in ("GET", "POST"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
                answer = guarded.request(method, path.replace("{name:path}", "tiny"), headers=headers)
                assert error(answer, 401) == "E_TOKEN" and answer.headers["www-authenticate"] == "Bearer"
    for path in PUBLIC:
        assert guarded.get(path).status_code == 200


def test_token__right_one(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.post(URL, content=PNG, headers=headers).status_code == 200


def test_token__twice_or_huge_is_400(guarded):
    twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")]
    assert error(guarded.get("/v1/models", headers=twice), 400) == "E_HEADER"
    huge = {"Authorization": "Bearer " + "x" * 5000}
    assert error(guarded.get("/v1/models", headers=huge), 400) == "E_HEADER"


def test_no_token__other_machines_are_refused(tiny):
    api = make_api(Pool({"tiny": tiny}), Limits(), watch=False)
    assert error(Client(api, address="10.1.2.3").get("/v1/models"), 403) == "E_LOOPBACK"
    assert Client(api, address="::1").get("/v1/models").status_code == 200


def test_middleware__strips_what_steers_the_proxy():
    seen = []

    async def app(scope, receive, send):
        seen.extend(name for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    client = Client(LimitsMiddleware(app, Limits()))
    bad = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id")
    client.get("/", headers={**{name: "../../x" for name in bad}, "x-serve-router-x": "1", "accept": "*/*"})
    assert b"accept" in seen and not [name for name in seen if b"serve" in name or b"x-request" in name]


def test_pages__load_nothing_from_elsewhere(client):
    for path in ("/", "/app.js", "/style.css", "/docs", "/docs.js", "/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text


def test_openapi__is_there(client):
    document = client.get("/openapi.json").json()
    route = document["paths"]["/v1/models/{name}/translate"]["post"]
    assert "image/png" in route["requestBody"]["content"] and "image/png" in route["responses"]["200"]["content"]


def test_hosted_model__same_pixels_as_the_translator(tiny):
    answer = asyncio.run(tiny.translate(PNG, {"to": "drawing"}))
    (direct,) = tiny.translator.pixels([picture()], Condition(to="drawing"))
    assert np.array_equal(codec.decode(answer["body"]), direct)


def test_hosted_model__concurrent_requests_keep_their_images(tiny):
    images = [picture(32 + i % 3, 40 + i) for i in range(12)]

    async def main():
        return await asyncio.gather(*(tiny.translate(codec.encode(i), {"to": "drawing"}) for i in images))

    for image, answer in zip(images, asyncio.run(main()), strict=True):
        assert np.array_equal(codec.decode(answer["body"]), 255 - image)
