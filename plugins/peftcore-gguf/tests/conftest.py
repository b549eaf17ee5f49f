"""A way to run commands, as tests/cli has it."""

from support.command_fixtures import run

__all__ = ["run"]
