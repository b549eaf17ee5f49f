"""Console output of the commands."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcore.errors import PeftcoreError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NO_METHOD = "no method is installed. Methods are separate packages, such as those in the source folder plugins/"

ERROR_OF_FIRST = 10.0  # seconds in which rank 0 prints an error that all ranks have

_speaker = ""  # name of this process in errors, if there are several


def silence(name: str) -> None:
    """Print only errors from now on, prefixed with this name."""
    global _speaker
    out.quiet, _speaker = True, f"{name}: "


def number(count: int, what: str) -> str:
    """Return `count` with a noun, such as "1 row" and "2 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def say(message: str, style: str | None = None) -> None:
    """Print a line without markup or wrapping."""
    out.print(Text(message, style=style or ""), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning to standard error."""
    if not out.quiet:
        err.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def note(message: str) -> None:
    """Print a remark to standard error, so that standard output has answers only."""
    if not out.quiet:
        err.print(Text(message, style="dim"), soft_wrap=True)


def leave_to_first_rank() -> None:
    """Before an error is printed: on other ranks of torchrun than 0, wait until torchrun ends them for rank 0's error.

    An error of all ranks is so printed once. The function returns on rank 0, and where rank 0 has not failed meanwhile.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        with suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ERROR_OF_FIRST)


def fail(message: str) -> NoReturn:
    """Print an error to standard error, of several ranks' errors one, and end the command with status 1."""
    leave_to_first_rank()
    err.print(Text(f"{_speaker}error: {message}", style="bold red"), soft_wrap=True)
    raise typer.Exit(1)


def command(*, resume: bool = False) -> str:
    """Return the current command line; with `resume`, as one that resumes."""
    arguments = sys.argv[1:]
    if resume:
        arguments = [*(each for each in arguments if each not in ("--resume", "--overwrite")), "--resume"]
    several = os.environ.get("WORLD_SIZE", "1")
    started = ["torchrun", "--nproc-per-node", several, "-m"] if several != "1" else []
    return shlex.join([*started, "peftcore", *arguments])


def table(rows: Iterable[Iterable[Any]], columns: Iterable[str] = ("", ""), title: str | None = None) -> None:
    """Print a table. Cells are plain text."""
    if title is not None:
        say(title)  # rich would wrap it at the width of the table
    columns = list(columns)
    grid = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    out.print(grid)


def require(*modules: str, extra: str = "train") -> None:
    """Import the libraries of an extra.

    Raises:
        PeftcoreError: one is not installed; the message says how to install it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise PeftcoreError(
                f"'{error.name}' is needed and not installed. Install it: pip install peftcore[{extra}]"
            ) from error
