"""The names of the package: each listed once, shown by `dir`, and free of PyTorch until one is used."""

import subprocess
import sys

import pytest

import peftcore


def test_dir_shows_the_public_names_and_no_other() -> None:
    assert dir(peftcore) == sorted(["__version__", *peftcore.__all__])
    assert {"apply", "merge", "summary", "Architecture", "FourBitConfig"} <= {*peftcore.__all__}
    assert all(
        getattr(peftcore, name).__module__.startswith("peftcore.") for name in peftcore.__all__ if name != "hookimpl"
    )


def test_a_function_stays_when_modules_are_imported() -> None:
    import peftcore.engine.summary
    import peftcore.merging.merge

    assert peftcore.merge is peftcore.merging.merge.merge
    assert peftcore.summary is peftcore.engine.summary.summary


def test_rooms_are_imported_when_they_are_named() -> None:
    code = (
        "import peftcore, sys; print('torch' in sys.modules, peftcore.targets.select.__name__, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "select", "True"]
    with pytest.raises(AttributeError, match="module 'peftcore' has no attribute 'nonsense'"):
        _ = peftcore.nonsense
