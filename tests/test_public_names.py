"""The names of the package: each listed once, shown by `dir`, and free of PyTorch until one is used."""

import ast
import compileall
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support import fresh_process

import peftcore


def test_dir_shows_the_public_names_and_no_other() -> None:
    assert dir(peftcore) == sorted(["__version__", *peftcore.__all__])
    assert {"apply", "merge", "summary", "FourBitConfig"} <= {*peftcore.__all__}
    assert all(
        getattr(peftcore, name).__module__.startswith("peftcore.") for name in peftcore.__all__ if name != "hookimpl"
    )


def test_type_checkers_and_programs_read_the_same_names() -> None:
    tree = ast.parse(Path(peftcore.__file__).with_suffix(".pyi").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "peftcore"]
    seen = {name.asname: node.module for node in imports for name in node.names if name.asname}
    assert sorted(seen) == peftcore.__all__
    assert all(getattr(peftcore, name) is getattr(import_module(str(home)), name) for name, home in seen.items())


EVERYWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import peftcore
assert peftcore.__file__.startswith(sys.argv[1]), peftcore.__file__
assert peftcore.apply.__module__ == "peftcore.engine.applying" and peftcore.quantization.quantize
from peftcore.plugin.peft_fields import defaults
assert defaults("LORA")["r"] == 8
print(*dir(peftcore))
"""


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    package = shutil.copytree(Path(peftcore.__file__).parent, tmp_path / "tree" / "peftcore", ignore=NO_BINARIES)
    return Path(shutil.make_archive(str(tmp_path / "packed"), "zip", package.parent))


@pytest.fixture
def without_sources(tmp_path: Path) -> Path:
    package = shutil.copytree(Path(peftcore.__file__).parent, tmp_path / "tree" / "peftcore", ignore=NO_BINARIES)
    compileall.compile_dir(package, quiet=1, legacy=True)
    for file in package.rglob("*.py"):
        file.unlink()
    return package.parent


NO_BINARIES = shutil.ignore_patterns("*.so", "__pycache__")


@pytest.mark.parametrize("where", ["zipped", "without_sources"])
def test_names_are_found_where_there_is_no_source_file(where: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(where))
    found = fresh_process.run(EVERYWHERE, path)
    assert found.stdout.split() == dir(peftcore), found.stderr


def test_a_function_stays_when_modules_are_imported() -> None:
    import peftcore.engine.merging.merge
    import peftcore.engine.summary

    assert peftcore.merge is peftcore.engine.merging.merge.merge
    assert peftcore.summary is peftcore.engine.summary.summary


def test_rooms_are_imported_when_they_are_named() -> None:
    code = (
        "import peftcore, sys; print('torch' in sys.modules)\n"
        "print(peftcore.model.detect.__name__, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "detect", "True"]
    with pytest.raises(AttributeError, match="module 'peftcore' has no attribute 'nonsense'"):
        _ = peftcore.nonsense


def test_names_of_peft_are_answered_with_ours() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'get_peft_model'\. Try: peftcore\.apply\(model, method\)"):
        _ = peftcore.get_peft_model
    for answer in peftcore._OF_PEFT.values():
        assert answer.partition("(")[0].removeprefix("peftcore.") in peftcore.__all__
