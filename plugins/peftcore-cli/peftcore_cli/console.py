"""Console output of the commands."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

import typer
from rich.console import Console as RichConsole, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from peftcore.errors import PeftcoreError

# What a terminal obeys instead of showing it, what changes the direction of text, and bytes that are not UTF-8 in names
# of files. Tabs and line ends stay.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with its control characters escaped, such as ESC as `\x1b`.

    Names and texts from a file may contain sequences that move the cursor, rename the window or hide what was printed.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class Console(RichConsole):
    """A console that escapes control characters in everything it prints; the colours are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class LogFormatter(logging.Formatter):
    """A formatter that escapes control characters in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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


def _plain(message: str, style: str | None = None) -> Text:
    # `Text` drops some control characters, so they are escaped before it is made.
    return Text(printable(message), style=style or "")


def say(message: str, style: str | None = None) -> None:
    """Print a line without markup or wrapping."""
    out.print(_plain(message, style), soft_wrap=True)


def print_answer(text: str, end: str = "\n") -> None:
    """Print what a model wrote: to a terminal escaped, to a file or a pipe as it is."""
    if out.is_terminal:
        out.print(_plain(text), end=end, soft_wrap=True)
    else:
        out.file.write(text + end)
        out.file.flush()


def print_json(document: object) -> None:
    """Print a document of `--json` to standard output. Numbers that are not finite, which JSON has not, become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(message: str) -> None:
    """Print a warning to standard error."""
    if not out.quiet:
        err.print(_plain(f"warning: {message}", "yellow"), soft_wrap=True)


def note(message: str) -> None:
    """Print a remark to standard error, so that standard output has answers only."""
    if not out.quiet:
        err.print(_plain(message, "dim"), soft_wrap=True)


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
    err.print(_plain(f"{_speaker}error: {message}", "bold red"), soft_wrap=True)
    raise typer.Exit(1)


def command(*, resume: bool = False) -> str:
    """Return the current command line; with `resume`, as one that resumes."""
    arguments = sys.argv[1:]
    if resume:
        arguments = [*(each for each in arguments if each not in ("--resume", "--overwrite")), "--resume"]
    several = os.environ.get("WORLD_SIZE", "1")
    program = ["peftcore"]
    if several != "1":
        program = ["torchrun", "--nproc-per-node", several, "-m", "peftcore_cli"]
    return shlex.join([*program, *arguments])


def table(rows: Iterable[Iterable[Any]], columns: Iterable[str] = ("", ""), title: str | None = None) -> None:
    """Print a table. Cells are plain text."""
    if title is not None:
        say(title)  # rich would wrap it at the width of the table
    columns = list(columns)
    grid = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(_plain(str(cell)) for cell in row))
    out.print(grid)


def require(*modules: str, extra: str | None = None) -> None:
    """Import libraries, so that a missing one is an error before the work begins.

    Args:
        modules: names of their modules.
        extra: the extra of peftcore that installs them; None if a module has the name of its package.

    Raises:
        PeftcoreError: one is not installed; the message says how to install it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = error.name if extra is None else f"peftcore[{extra}]"
            raise PeftcoreError(
                f"'{error.name}' is needed and not installed. Install it: pip install {package}"
            ) from error
