"""Who imports whom: the contracts of pyproject.toml, and what is really loaded at run time."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from models import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "boto3", "matplotlib", "cv2", "numpy")
TRAINING = (
    "ray.train",
    "ray.tune",
    "optuna",
    "tune_spaces",
    "models.engine",
    "pipelines.config",
    "pipelines.loop",
    "pipelines.reader",
    "pipelines.stream",
    "pipelines.tracking",
    "pipelines.train",
    "pipelines.tune",
    *(module for module, _ in SYSTEMS.values()),
)


def _loaded(statement: str) -> set[str]:
    """Names of all modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nsys.stderr.write('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split("\n"))


def test_contracts__hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_contracts__name_every_system():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    modules = {module for module, _ in SYSTEMS.values()}
    for contract in settings["contracts"]:
        named = {
            *contract.get("modules", []),
            *contract.get("source_modules", []),
            *contract.get("forbidden_modules", []),
        }
        assert not named & modules or modules <= named, contract["name"]


def test_command_line__is_built_without_anything_heavy():
    code = (
        "import sys\nfrom pipelines import cli\nsys.argv = ['i2i', '--help']\nsys.stdout = open('/dev/null', 'w')\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not _loaded(code) & set(HEAVY)


@pytest.mark.parametrize(
    "module", ["models", "models.errors", "tune_spaces", "pipelines", "pipelines.console", "deploy"]
)
def test_import__is_light(module: str):
    assert not _loaded(f"import {module}") & {"torch", "ray", "mlflow"}


def test_server__loads_no_training_code():
    assert not _loaded("import deploy.app") & set(TRAINING)


def test_models__load_no_ray_and_no_network():
    modules = ", ".join(
        f"models.{path.stem}" for path in sorted((ROOT / "models").glob("*.py")) if path.stem != "__init__"
    )
    assert not _loaded(f"import {modules}") & {"ray", "mlflow", "boto3", "s3fs", "requests"}
