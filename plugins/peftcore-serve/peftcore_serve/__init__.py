"""The command `peftcore serve`, which serves a base and a folder of adapters over OpenAI's HTTP protocol."""

from __future__ import annotations

from peftcore.plugin import Command, hookimpl
from peftcore_serve import command

peftcore_api = ">=3.1,<4"


@hookimpl
def peftcore_commands() -> list[Command]:
    """Return the command `serve`."""
    return [Command("serve", command.serve, command.EXAMPLES)]
