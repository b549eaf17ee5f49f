"""The package's annotations are without errors, and say to a user's type checker what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TYPED = Path(__file__).parent / "typed"


def mypy(*arguments: object) -> str:
    """What mypy says, with the settings and the cache of `make lint`."""
    plugins = [str(path.parent) for path in ROOT.glob("plugins/*/pyproject.toml")]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), *plugins])}
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["user.py", "author.py"])
def test_a_script_is_understood(script: str) -> None:
    lines = enumerate((TYPED / script).read_text().splitlines(), 1)
    wanted = {number: line.partition("# E: ")[2] for number, line in lines if "# E: " in line}
    found: dict[int, str] = {}
    for line in mypy(TYPED / script).splitlines():
        match = re.match(rf"tests/typed/{re.escape(script)}:(\d+): error: (.*)", line)
        if match is not None:
            found[int(match[1])] = match[2]
    assert found.keys() == wanted.keys(), found
    for number, message in wanted.items():
        assert message in found[number]
