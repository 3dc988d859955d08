"""The repository's promises about itself."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "pipelines", "tune_spaces", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Function → the keyword that makes it safe, or None where nothing does.
UNSAFE = {
    "pickle.load": None,
    "pickle.loads": None,
    "cloudpickle.load": None,
    "cloudpickle.loads": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "marshal.loads": None,
    "mlflow.pytorch.load_model": None,
    "eval": None,
    "exec": None,
    "torch.load": "weights_only",
}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints() -> dict[str, Version]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {_normal(name): Version(version) for name, version in pairs}


def _requirements() -> list[Requirement]:
    extra = PROJECT["project"]["optional-dependencies"]
    return [Requirement(text) for text in (*PROJECT["project"]["dependencies"], *extra["dev"])]


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda requirement: requirement.name)
def test_constraints__satisfy_pyproject(requirement: Requirement):
    tested = _constraints().get(_normal(requirement.name))
    if requirement.name == "torch":
        assert tested is None, "CPU and CUDA builds differ: torch is pinned in pyproject.toml only"
        return
    assert tested is not None, f"{requirement.name} is missing from constraints.txt; run `make constraints`"
    assert requirement.specifier.contains(tested, prereleases=True)


@pytest.mark.parametrize("name", ["ray", "torch", "mlflow", "pyarrow"])
def test_pins__are_exact(name: str):
    (requirement,) = (r for r in _requirements() if r.name == name)
    assert re.fullmatch(r"==[0-9.]+", str(requirement.specifier))


def test_packages__are_all_listed():
    """A package that pyproject does not list would be missing from an installed copy."""
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_readme__names_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SOURCES.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_documents__links_lead_somewhere(document: str):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_contributing__is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "adr").glob("*.md")), ids=lambda path: path.stem)
def test_decisions__fit_on_a_page(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert re.match(r"\d{4}-[a-z0-9-]+\.md$", path.name)
    for heading in ("## Context", "## Decision", "## Consequences", "## Evidence"):
        assert heading in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources__load_nothing_that_could_run_code(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in UNSAFE:
            keyword = UNSAFE[name]
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert keyword and given.get(keyword) == "True", f"{path.name}:{node.lineno}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources__have_a_docstring_and_absolute_imports(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the module's docstring is missing"
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def test_web_page__refers_to_nothing_outside():
    """The page works without the Internet: no script, font or style from elsewhere."""
    for path in (ROOT / "deploy" / "web").glob("*"):
        if path.suffix in {".html", ".css", ".js"}:
            text = path.read_text().replace("http://www.w3.org/", "")
            assert not re.search(r"""(src|href|url|import|fetch)\s*[=(]?\s*["'(]?\s*(https?:)?//""", text), path.name


def test_tracked_files__are_small_and_free_of_machine_paths():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 500_000, f"{name} is large"
        data = path.read_bytes()
        assert b"\0" in data or not re.search(rb"/(home|Users)/[a-z]+/|/root[/]", data), (
            f"{name} names a path of a machine"
        )


def test_makefile__targets_are_phony_and_described():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    described = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    assert phony == described
