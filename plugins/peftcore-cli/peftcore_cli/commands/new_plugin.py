"""`peftcore new-plugin`: create a package for a new method, with a passing test.

The files are templates of the standard library in `plugin_template/`.
"""

from __future__ import annotations

import re
import shlex
from enum import Enum
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli.console import say

EXAMPLES = ("peftcore new-plugin gain --kind around",)

_TEMPLATES = files(__package__) / "plugin_template"


class Kind(str, Enum):
    """Placement of the new method."""

    around = "around"
    after = "after"
    on_weight = "on-weight"
    soft_prompt = "soft-prompt"
    prefix = "prefix"
    train = "train"


# Checks and model families of the conformance suite that a method with this placement cannot pass, and the reason.
_NO_MERGE = {"merge equals forward, unmerge is bit exact": "it does not change a weight"}
_PROMPT = {
    **_NO_MERGE,
    "identity at the start": "the vectors have an effect from the start",
    "ViT": "images have no tokens before which vectors could stand",
}
_NOT_APPLICABLE = {Kind.after: _NO_MERGE, Kind.soft_prompt: _PROMPT, Kind.prefix: _PROMPT}


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the method: lowercase letters, digits and hyphens.")],
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            help="Where the method attaches: around or after a layer, on a weight, before the input, in the cache, "
            "or to parameters of the base.",
        ),
    ] = Kind.around,
    folder: Annotated[Path, typer.Option("--folder", help="Parent folder of the package.")] = Path("."),
) -> None:
    """Create a package for a new method: pyproject.toml, README.md, a module and its test."""
    package = write(name, kind, folder)
    say(f"wrote {package}. Next:")
    for command in commands(package):
        say(f"  {command}")


def commands(package: Path) -> list[str]:
    """Return the command lines that install and test the new package in an environment with peftcore."""
    return [
        f"python -m pip install -e {shlex.quote(f'{package}[test]')}",
        f"python -m pytest {shlex.quote(str(package))}",
    ]


def write(name: str, kind: Kind, folder: Path) -> Path:
    """Write the package `peftcore-NAME` into `folder`, and return the package's folder.

    Raises:
        PeftcoreError: the name is not valid, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise PeftcoreError(
            f"a method's name must consist of lowercase letters, digits and single hyphens, found '{name}'"
        )
    package = folder / f"peftcore-{name}"
    if package.exists():
        raise PeftcoreError(f"'{package}' exists already. Choose another name or folder")
    module = f"peftcore_{name.replace('-', '_')}"
    reasons = [f'    "{check}": "{reason}",\n' for check, reason in _NOT_APPLICABLE.get(kind, {}).items()]
    words = {
        "name": name,
        "module": module,
        "title": "".join(part.title() for part in name.split("-")),
        "peft_type": name.upper().replace("-", "_"),
        "not_applicable": "{\n" + "".join(reasons) + "}" if reasons else "{}",
    }
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": f"{kind.name}.py",
        f"tests/test_{module.removeprefix('peftcore_')}.py": "test.py",
    }
    for path, template in templates.items():
        text = (_TEMPLATES / f"{template}.template").read_text(encoding="utf-8")
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(Template(text).substitute(words), encoding="utf-8")
    return package
