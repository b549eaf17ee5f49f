"""Commands and integrations, which packages add through the hooks `peftcore_commands` and `peftcore_integrations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Command:
    """A command of the command line, `peftcore NAME`.

    Args:
        name: name that the user types.
        function: function that runs the command. typer reads options from its parameters, and the help text from its
            docstring. A parameter whose type is a dataclass becomes one option per field. A `PeftcoreError` ends the
            command with its message. If the function has a parameter `as_json` and it is true, the returned object is
            printed as JSON, and all other output goes to standard error. `peftcore --help` imports the function's
            module, so import heavy libraries inside functions.
        examples: command lines for the end of `peftcore NAME --help`.
    """

    name: str
    function: Callable[..., object]
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Integration:
    """Code that makes another library work with models that have adapters. It does not run without adapters.

    Args:
        name: unique name, for error messages.
        library: module of the library, such as `transformers.trainer`.
        on_import: () -> None, called once, as soon as an adapter has been applied in this process and `library` has
            been imported.
        on_apply: (model) -> None, called after each `apply` to a model of the library, which is a model with a class
            defined in the package of `library`.
    """

    name: str
    library: str
    on_import: Callable[[], object] | None = None
    on_apply: Callable[[nn.Module], object] | None = None
