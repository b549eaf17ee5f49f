"""What is published: source archives are whole, packages describe themselves, READMEs are right on an index."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
NOT_SHIPPED = (".ci/", ".github/", ".pre-commit-config.yaml")
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
URL = "https://host.example/owner/peftcore"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository's files alone: building leaves others behind."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files are the project's, git knows")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


def archived(project: Path) -> dict[str, tarfile.TarInfo]:
    """What the source archive of a project holds, by names in its folder."""
    subprocess.run([sys.executable, "-c", SDIST, "dist"], cwd=project, check=True, capture_output=True)
    with tarfile.open(next(project.glob("dist/*.tar.gz"))) as held:
        return {member.name.partition("/")[2]: member for member in held}


def test_the_source_archive_holds_every_file(tree: Path) -> None:
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if not path.is_dir()}
    left_behind = [
        "peftcore/_C.so",
        "peftcore/_build.json",
        "tests/support/tiny.pyc",
        "plugins/peftcore-lora/x.egg-info/PKG-INFO",
    ]
    for name in left_behind:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    held = archived(tree)
    assert {name for name in files if not name.startswith(NOT_SHIPPED)} <= held.keys()
    assert not held.keys() & {*left_behind}


def test_the_package_data_names_every_file_that_is_not_python() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads(PROJECTS[0].read_text())["tool"]["setuptools"]
    package = ROOT / "peftcore"
    packaged = {path for pattern in settings["package-data"]["peftcore"] for path in package.glob(pattern)}
    built = {".so", ".pyc"}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", *built}}
    assert others - {package / "_build.json"} == packaged


def test_a_plugins_archive_has_the_license_itself(tree: Path) -> None:
    held = archived(tree / "plugins" / "peftcore-lora")
    assert held["LICENSE"].isfile() and held["LICENSE"].size == (ROOT / "LICENSE").stat().st_size
    assert {"README.md", "peftcore_lora/py.typed"} <= held.keys()


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_a_package_describes_itself(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    core, described = (tomllib.loads(path.read_text())["project"] for path in (PROJECTS[0], project))
    for name in ("license", "license-files", "authors", "readme", "requires-python", "version"):
        assert described[name] == core[name], name
    assert described["description"] and described["keywords"]
    assert {c for c in core["classifiers"] if c.startswith("Programming Language :: Python")} <= set(
        described["classifiers"]
    )
    assert "urls" not in described  # the publishing workflow knows where the repository is
    assert (project.parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    typed = [path for path in project.parent.glob("peftcore*/__init__.py") if (path.parent / "py.typed").exists()]
    assert bool(typed) == ("Typing :: Typed" in described["classifiers"])  # a single file cannot say it (PEP 561)


@pytest.fixture(scope="module")
def for_index() -> Any:
    """The script of the publishing workflow; no package, so that it runs before anything is installed."""
    path = ROOT / ".github" / "for_index.py"
    if not path.exists():
        pytest.skip("a source archive has no workflows")
    spec = importlib.util.spec_from_file_location("for_index", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.parent.name)
def test_links_of_a_readme_are_absolute_on_an_index(project: Path, for_index: Any) -> None:
    written = (project.parent / "README.md").read_text()
    assert "pypi.org/project/peftcore" not in written  # nothing is published yet; a link to the folder holds either way
    shown = for_index.absolute(written, project.parent, ROOT, URL, "v1")
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert targets or "](" not in written
    for target in targets:
        assert target.startswith("https://"), target
        if target.startswith(URL):
            kind, tag, path = target.removeprefix(f"{URL}/").split("/", 2)
            there = ROOT / path.partition("#")[0]
            assert there.is_dir() if kind == "tree" else there.is_file(), target
            assert tag == "v1" and (kind == "raw") == path.endswith(".png"), target


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, for_index: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"links to docs/gone\.md"):
        for_index.absolute("[gone](docs/gone.md)", tmp_path, tmp_path, URL, "v1")
    assert (
        for_index.absolute("[a](#part) [b](mailto:x@y.z)", tmp_path, tmp_path, URL, "v1")
        == "[a](#part) [b](mailto:x@y.z)"
    )


def test_a_wheel_asks_for_the_pytorch_that_it_is_built_with() -> None:
    workflow = ROOT / ".github" / "workflows" / "wheels.yml"
    if not workflow.exists():
        pytest.skip("a source archive has no workflows")
    (replaced,) = re.findall(r'sed -i "s/(.*?)/.*?/" pyproject.toml', workflow.read_text().replace("\\", ""))
    assert PROJECTS[0].read_text().count(replaced) == 2  # build-system.requires and dependencies
