"""The server as it runs: Ray Serve, HTTP over a socket, the MLflow registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from deploy import app
from models import codec, system_class
from models.bundle import load_bundle, save_bundle
from models.errors import BundleError, ConfigError
from models.system import Condition
from models.translator import Translator

TOKEN = "correct-horse-battery-staple"
ROOT = Path(__file__).parents[2]


def make_bundle(directory: Path, name: str, seed: int, **config) -> Path:
    torch.manual_seed(seed)
    cls = system_class(name)
    system = cls(cls.Config(size=32, **config), domains=("color", "mono"))
    for network in system.generators:
        for parameter in system.networks[network].parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0, 0.1)
    save_bundle(directory / "bundle", system, size=32, step=1, ema=False)
    return directory / "bundle"


def register(bundle: Path, root: Path, name: str, alias: str) -> str:
    """A version in a registry of its own; the tracking URI."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with contextlib.suppress(MlflowException):  # it is there
        client.create_registered_model(name)
    tags = {"weights_sha256": load_bundle(bundle).sha256}
    version = client.create_model_version(name, str(bundle), tags=tags)
    client.set_registered_model_alias(name, alias, version.version)
    return uri


def picture(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)


def code(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {
        "letters": make_bundle(root / "letters", "cyclegan", 1, width=4, blocks=1),
        "pairs": make_bundle(root / "pairs", "pix2pix", 2, width=4, levels=4),
    }


@pytest.fixture(scope="module")
def server(ray_session, bundles, tmp_path_factory):
    """CycleGAN by its path, pix2pix from the registry, behind a token."""
    root = tmp_path_factory.mktemp("serve")
    uri = register(bundles["pairs"], root, "pairs", "champion")
    (root / "token").write_text(TOKEN + "\n")
    url = app.start(
        models=["pairs@champion"],
        bundles=[str(bundles["letters"])],
        port=0,
        tracking_uri=uri,
        token_file=root / "token",
        timeout_s=20,
        max_bytes=1024**2,
    )
    yield url
    app.stop()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=60) as it:
        yield it


def expected(bundle: Path, image: np.ndarray, **condition) -> np.ndarray:
    return Translator(load_bundle(bundle)).pixels([image], Condition(**condition))[0]


@pytest.mark.parametrize(
    ("model", "to", "bundle"),
    [("letters", "mono", "letters"), ("letters", "color", "letters"), ("pairs", "mono", "pairs")],
)
def test_translate__same_pixels_as_in_process(client, bundles, model, to, bundle):
    answer = client.post(f"/v1/models/{model}/translate?to={to}", content=codec.encode(picture()))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    out = codec.decode(answer.content)
    assert out.shape == picture().shape
    assert np.abs(out.astype(int) - expected(bundles[bundle], picture(), to=to)).max() <= 1
    assert answer.headers.get_list("x-request-id") and len(answer.headers.get_list("x-request-id")) == 1
    assert "model;dur=" in answer.headers["server-timing"]
    version = load_bundle(bundles["letters"]).sha256[:12] if model == "letters" else "1"
    assert answer.headers["x-model-version"] == version


def test_models_and_readiness(client):
    models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert models["letters"]["system"] == "cyclegan" and models["pairs"]["version"] == "1"
    assert models["pairs"]["conditioning"]["directions"] == [{"source": "color", "to": "mono"}]
    assert client.get("/readyz").json() == {"status": "ok", "models": {"letters": "ready", "pairs": "ready"}}
    assert client.get("/healthz").status_code == 200


def test_refusals__over_the_socket(server, client):
    url = "/v1/models/letters/translate"
    png = codec.encode(picture())
    with httpx.Client(base_url=server, trust_env=False) as stranger:
        assert code(stranger.post(url, content=png), 401) == "E_TOKEN"
        assert stranger.get("/").status_code == 200
    assert code(client.post(url + "?to=monoo", content=png), 422) == "E_DOMAIN"
    assert code(client.post("/v1/models/pairs/translate?to=color", content=png), 422) == "E_DOMAIN"
    assert code(client.post(url + "?seed=3", content=png), 422) == "E_PARAMETER"
    assert code(client.post(url, content=png[:900]), 422) == "E_IMG_TRUNCATED"
    assert code(client.post(url, content=bytes(3 * 1024**2)), 413) == "E_BODY_SIZE"
    assert code(client.post("/v1/models/nobody/translate", content=png), 404) == "E_MODEL_UNKNOWN"
    assert code(client.post(url, content=png, headers={"Content-Encoding": "gzip"}), 415) == "E_ENCODING"
    for headers in ({"x-request-timeout-seconds": "0"}, {"serve_multiplexed_model_id": "../../x"}):
        assert client.post(url, content=png, headers=headers).status_code == 200


def test_concurrent_requests__each_gets_its_own(client, server, bundles):
    images = [np.roll(picture(40 + i % 3, 60), 7 * i, axis=1) for i in range(24)]
    wanted = [expected(bundles["letters"], image, to="mono") for image in images]

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server, headers=client.headers, trust_env=False, timeout=60) as many:
            url = "/v1/models/letters/translate?to=mono"
            return await asyncio.gather(*(many.post(url, content=codec.encode(image)) for image in images))

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200] * len(images)
    for answer, want in zip(answers, wanted, strict=True):
        assert np.abs(codec.decode(answer.content).astype(int) - want).max() <= 1


def test_port_in_use__one_line(server, bundles):
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(ConfigError) as error:
        app.start(bundles=[str(bundles["letters"])], port=port)
    assert str(error.value) == f"port {port} on 127.0.0.1 is in use: choose another with --port"


def test_start__mistakes(bundles, tmp_path, monkeypatch):
    monkeypatch.delenv("I2I_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="nothing to serve"):
        app.start(port=0)
    with pytest.raises(ConfigError, match="two models of the name letters"):
        app.start(bundles=[str(bundles["letters"]), str(bundles["letters"])], port=0)
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        app.start(bundles=[str(tmp_path)], port=0)
    with pytest.raises(BundleError, match="no model registry"):
        app.start(models=["demo"], tracking_uri=f"sqlite:///{tmp_path}/none.db", port=0)
    with pytest.raises(ConfigError, match="not a name of a model"):
        app.start(models=["../demo"], port=0)
    uri = register(bundles["letters"], tmp_path, "letters", "champion")
    with pytest.raises(BundleError, match="the registry has no model letters@other"):
        app.start(models=["letters@other"], tracking_uri=uri, port=0)
    with pytest.raises(ConfigError, match=r"refusing to serve on 0\.0\.0\.0 without a token"):
        app.build_app({"bundles": [str(bundles["letters"])], "host": "0.0.0.0"})
    (tmp_path / "short").write_text("secret")
    with pytest.raises(ConfigError, match="holds no usable token") as error:
        app.start(bundles=[str(bundles["letters"])], token_file=str(tmp_path / "short"), port=0, host="0.0.0.0")
    assert "secret" not in str(error.value)


def test_registry__other_weights_than_registered_are_refused(bundles, tmp_path):
    moved = make_bundle(tmp_path / "moved", "cyclegan", 3, width=4, blocks=1)
    uri = register(moved, tmp_path, "moved", "champion")
    make_bundle(tmp_path / "moved", "cyclegan", 4, width=4, blocks=1)
    with pytest.raises(BundleError) as error:
        app.start(models=["moved"], tracking_uri=uri, port=0)
    assert error.value.code == "E_BUNDLE_DIGEST"


def test_import__loads_no_training_code():
    program = "import sys, deploy.app; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    names = ("storage", "storage_s3", "console", "cluster", "bundle_uri", "mlflow_env")
    allowed = {"pipelines"} | {f"pipelines.{name}" for name in names}
    assert {name for name in modules if name.split(".")[0] in ("pipelines", "tune_spaces")} <= allowed


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_run__ends_cleanly_on_a_signal(bundles, number, status, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"from deploy.app import run; raise SystemExit(run(bundles=[{str(bundles['letters'])!r}], port={port}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=err, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 90
        while "serving on" not in (tmp_path / "err").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.2)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/models/letters/translate",
            content=codec.encode(picture()),
            trust_env=False,
            timeout=30,
        )
        assert answer.status_code == 200
        process.send_signal(number)
        assert process.wait(60) == status
    finally:
        process.kill()
        process.wait()
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines == [f"serving on http://127.0.0.1:{port} (Ctrl-C ends it)", "stopping"]
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
