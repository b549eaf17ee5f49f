"""`peftcore new-plugin`: write the package of a new method, which installs, passes its test, and trains."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from peftcore.cli.console import say
from peftcore.errors import PeftcoreError

EXAMPLES = ("peftcore new-plugin gain --kind around",)


class Kind(str, Enum):
    """Placement of the new method."""

    around = "around"
    after = "after"
    on_weight = "on-weight"
    soft_prompt = "soft-prompt"
    prefix = "prefix"
    train = "train"


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the method: lowercase letters, digits and hyphens.")],
    kind: Annotated[Kind, typer.Option("--kind", help="Placement of the method.")] = Kind.around,
    folder: Annotated[Path, typer.Option("--folder", help="Folder to create the package in.")] = Path("."),
) -> None:
    """Write the package of a new method: pyproject.toml, README.md, a module and its test."""
    package = write(name, kind.value, folder)
    say(f"wrote {package}. Next:")
    say(f"  pip install --no-build-isolation -e {package}")
    say(f"  python -m pytest {package}")


def write(name: str, kind: str, folder: Path) -> Path:
    """Write the package `peftcore-NAME` to `folder`, and return its folder.

    Raises:
        PeftcoreError: the name is not valid, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise PeftcoreError(f"a method's name must be lowercase letters, digits and single hyphens, found '{name}'")
    package = folder / f"peftcore-{name}"
    if package.exists():
        raise PeftcoreError(f"'{package}' exists already. Choose another name or folder")
    module = f"peftcore_{name.replace('-', '_')}"
    words = {
        "name": name,
        "module": module,
        "title": "".join(part.title() for part in name.split("-")),
        "peft_type": name.upper().replace("-", "_"),
        "excused": "".join(f'    "{check}": "{reason}",\n' for check, reason in _EXCUSED[kind].items()),
    }
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{module}.py": _MODULES[kind],
        f"tests/test_{module.removeprefix('peftcore_')}.py": _TEST,
    }
    for path, text in files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(Template(text).substitute(words), encoding="utf-8")
    return package


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "peftcore-$name"
version = "0.1.0"
description = "$title for peftcore"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["peftcore>=0.1"]

[project.entry-points.peftcore]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]
"""

_README = """\
# peftcore-$name

A fine-tuning method for peftcore.

```python
import peftcore

model = peftcore.apply(model, "$name")
```
"""

_TEST = '''\
"""$title passes the conformance suite."""

from $module import ${title}Config

from peftcore.plugin import check_method

# Checks that this method cannot pass, each with its reason.
NOT_APPLICABLE = {
$excused}


def test_conformance() -> None:
    check_method(${title}Config(), not_applicable=NOT_APPLICABLE)
'''

_HEAD = '''\
"""$title: {formula}"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcore.plugin import {names}

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class ${title}Config:
{fields}

'''

_HOOK = """

@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="$peft_type")
    return [Method("$name", ${title}Config, place, rules)]
"""

_TARGETS = '''\
    """target_modules: suffixes, a regular expression for whole paths, or all-linear."""

    target_modules: str | list[str] = "all-linear"
'''

_RANK = '''\
    """target_modules: suffixes, a regular expression for whole paths, or all-linear. r: rank of the change."""

    target_modules: str | list[str] = "all-linear"
    r: int = 4

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise PeftcoreError(f"r must be positive, found {self.r}")
'''

_TOKENS = '''\
    """num_virtual_tokens: how many vectors are learned."""

    num_virtual_tokens: int = 8

    def __post_init__(self) -> None:
        if self.num_virtual_tokens <= 0:
            raise PeftcoreError(f"num_virtual_tokens must be positive, found {self.num_virtual_tokens}")
'''

_SELECT = """\
def place(model: nn.Module, config: ${title}Config, architecture: Architecture) -> list[Placement]:
    layers = targets.select(model, architecture, target_modules=config.target_modules)
"""

_MODULES = {
    "around": _HEAD.replace(
        "{names}", "Adapter, Architecture, Around, Base, Method, Placement, StateRules, hookimpl, override, targets"
    )
    .replace("{formula}", "y = gain · base(x), one learned gain for each output.")
    .replace("{fields}", _TARGETS)
    + '''\
class $title(Adapter):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) * self.gain.to(x.dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and the bias that compute the same without the adapter."""
        return weight * self.gain[:, None], None if bias is None else bias * self.gain


'''
    + _SELECT
    + "    return [Around(path, $title(targets.sizes(layer)[1])) for path, layer in layers.items()]\n"
    + _HOOK,
    "after": _HEAD.replace("{names}", "Adapter, After, Architecture, Method, Placement, StateRules, hookimpl, targets")
    .replace("{formula}", "y -> y + shift, one learned shift for each output.")
    .replace("{fields}", _TARGETS)
    + """\
class $title(Adapter):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.shift.to(y.dtype)


"""
    + _SELECT
    + "    return [After(path, $title(targets.sizes(layer)[1])) for path, layer in layers.items()]\n"
    + _HOOK,
    "on-weight": _HEAD.replace(
        "{names}", "Adapter, Architecture, Method, OnWeight, PeftcoreError, Placement, StateRules, hookimpl, targets"
    )
    .replace("{formula}", "W + B A, a change of low rank of the chosen weights.")
    .replace("{fields}", _RANK)
    + """\
class $title(Adapter):
    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).to(weight.dtype)


"""
    + _SELECT
    + """\
    placements: list[Placement] = []
    for path, layer in layers.items():
        columns, rows = targets.sizes(layer)
        if targets.is_conv1d(layer):  # GPT-2 stores its weights [in, out]
            rows, columns = columns, rows
        placements.append(OnWeight(path, "weight", $title(rows, columns, config.r)))
    return placements
"""
    + _HOOK,
    "soft-prompt": _HEAD.replace(
        "{names}", "Adapter, Architecture, Method, PeftcoreError, Placement, SoftPrompt, StateRules, hookimpl"
    )
    .replace("{formula}", "learned vectors [tokens, hidden] before the input.")
    .replace("{fields}", _TOKENS)
    + """\
class $title(Adapter):
    def __init__(self, tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(0.02 * torch.randn(tokens, hidden_size))

    def forward(self) -> Tensor:
        return self.prompt


def place(model: nn.Module, config: ${title}Config, architecture: Architecture) -> list[Placement]:
    return [SoftPrompt($title(config.num_virtual_tokens, architecture.hidden_size))]
"""
    + _HOOK,
    "prefix": _HEAD.replace(
        "{names}", "Adapter, Architecture, Method, PeftcoreError, Placement, PrefixKV, StateRules, hookimpl"
    )
    .replace("{formula}", "learned keys and values before those of the input, in every layer.")
    .replace("{fields}", _TOKENS)
    + """\
class $title(Adapter):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self) -> Tensor:
        return self.prefix


def place(model: nn.Module, config: ${title}Config, architecture: Architecture) -> list[Placement]:
    a = architecture
    return [PrefixKV($title(a.num_layers, 2, a.num_kv_heads, config.num_virtual_tokens, a.head_dim))]
"""
    + _HOOK,
    "train": _HEAD.replace(
        "{names}", "Architecture, Method, PeftcoreError, Placement, StateRules, Train, hookimpl, targets"
    )
    .replace("{formula}", "some parameters of the base are trained themselves.")
    .replace("import torch\nfrom torch import Tensor, nn\n", "from torch import nn\n")
    .replace(
        "{fields}",
        '''\
    """ending: parameters of norms, the vectors of a model, whose names end so are trained."""

    ending: str = "weight"
''',
    )
    + """\
def place(model: nn.Module, config: ${title}Config, architecture: Architecture) -> list[Placement]:
    vectors = [name for name, parameter in targets.base_parameters(model) if parameter.dim() == 1]
    names = [name for name in vectors if name.endswith(config.ending)]
    if not names:
        raise PeftcoreError(f"no vector's name ends with '{config.ending}'")
    return [Train(names)]
"""
    + _HOOK,
}

_NO_WEIGHT = {"merge equals forward, unmerge is bit exact": "it does not change a weight"}
_PROMPT = {
    **_NO_WEIGHT,
    "identity at the start": "the vectors act from the start",
    "ViT": "images have no tokens before which vectors could stand",
}
_EXCUSED: dict[str, dict[str, str]] = {
    "around": {},
    "after": _NO_WEIGHT,
    "on-weight": {},
    "soft-prompt": _PROMPT,
    "prefix": _PROMPT,
    "train": {},
}
