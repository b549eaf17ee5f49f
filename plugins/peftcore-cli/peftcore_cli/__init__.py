"""The command `peftcore`."""

from __future__ import annotations

import sys

import peftcore_cli.start  # noqa: F401  # the time from here on is the run's


def main() -> None:
    """Run the command line; if its libraries are not installed, print how to install them."""
    try:
        from peftcore_cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"peftcore: the command line needs '{error.name}'. Install it: pip install peftcore-cli")
    run()
