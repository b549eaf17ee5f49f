"""The command `peftcore compare`, which trains several methods on the same model and examples."""

from __future__ import annotations

from peftcore.plugin import Command, hookimpl
from peftcore_compare import command

peftcore_api = ">=3.1,<4"


@hookimpl
def peftcore_commands() -> list[Command]:
    """Return the command `compare`."""
    return [Command("compare", command.compare, command.EXAMPLES)]
