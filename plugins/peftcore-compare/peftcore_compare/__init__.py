"""The command `peftcore compare`: several methods on one model and one set of examples."""

from __future__ import annotations

from peftcore.plugin import Command, hookimpl
from peftcore_compare import command

peftcore_api = ">=3.1,<4"


@hookimpl
def peftcore_commands() -> list[Command]:
    """Return the command `compare`."""
    return [Command("compare", command.compare, command.EXAMPLES)]
