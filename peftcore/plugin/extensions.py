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
        name: name as it is typed.
        function: function that runs the command. typer reads options from its parameters, and the help text from its
            docstring; a parameter whose type is a dataclass becomes one option for each field. A `PeftcoreError` ends
            the command with its message. If the function has a parameter `as_json` that is true, the object that it
            returns is printed as JSON, and its other output goes to standard error. `peftcore --help` imports the
            function's module, which therefore imports heavy libraries within functions.
        examples: command lines for the end of `peftcore NAME --help`.
    """

    name: str
    function: Callable[..., object]
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Integration:
    """Code that makes another library work with models that have adapters. Without adapters none of it runs.

    Args:
        name: name for messages; no other integration has it.
        library: module of the library, such as `transformers.trainer`.
        on_import: () -> None, called once, as soon as an adapter has been applied in this process and `library` has
            been imported, whichever comes second.
        on_apply: (model) -> None, called after each `apply` to a model of the library: one of the model's classes is
            defined in the package of `library`.
    """

    name: str
    library: str
    on_import: Callable[[], object] | None = None
    on_apply: Callable[[nn.Module], object] | None = None
