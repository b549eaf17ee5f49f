"""Print the requirements of peftcore and its plugins, including all extras, for `make lock`.

Packages of this repository are on no index: they are left out, and their own requirements are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).resolve().parents[1]


def requirements(file: Path) -> set[str]:
    """Return the requirements of one `pyproject.toml`: to build, to run, and of every extra."""
    contents = tomllib.loads(file.read_text())
    project = contents["project"]
    names = {*contents["build-system"]["requires"], *project.get("dependencies", ())}
    for extra in project.get("optional-dependencies", {}).values():
        names.update(extra)
    return names


if __name__ == "__main__":
    files = [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
    lines = set().union(*(requirements(file) for file in files))
    print(*sorted(line for line in lines if not Requirement(line).name.startswith("peftcore")), sep="\n")
