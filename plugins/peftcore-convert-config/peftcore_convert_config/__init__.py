"""The command `peftcore convert-config`: configs of axolotl, LLaMA-Factory and torchtune for `peftcore train`."""

from __future__ import annotations

from peftcore.plugin import Command, hookimpl
from peftcore_convert_config import command

peftcore_api = ">=3.1,<4"


@hookimpl
def peftcore_commands() -> list[Command]:
    """Return the command `convert-config`."""
    return [Command("convert-config", command.convert_config, command.EXAMPLES)]
