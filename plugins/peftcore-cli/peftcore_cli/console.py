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

# Control characters, characters that change the direction of text, and surrogates, which stand for bytes of file names
# that are not UTF-8. Tabs and line breaks stay.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with control characters escaped (ESC becomes `\x1b`).

    Names and texts from files may contain escape sequences that move the cursor, rename the window or hide output.
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


class Console(RichConsole):
    """Console that escapes all control characters in its output, except for its own colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of the text, with control characters escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class LogFormatter(logging.Formatter):
    """A formatter that escapes control characters in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NO_METHOD = (
    "no method is installed. Methods are separate packages: install one from the folder plugins/ of peftcore's "
    "repository"
)

RANK_0_TIMEOUT = 10.0  # seconds to wait for rank 0 to print an error

_prefix = ""  # prefix of error messages; names this process if there are several


def silence(name: str) -> None:
    """Print only errors from now on, prefixed with this name."""
    global _prefix
    out.quiet, _prefix = True, f"{name}: "


def number(count: int, noun: str) -> str:
    """Return `count` with a noun, such as "1 row" and "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _plain(message: str, style: str | None = None) -> Text:
    # `Text` drops some control characters, so escape them first.
    return Text(printable(message), style=style or "")


def say(message: str, style: str | None = None) -> None:
    """Print a line without markup or wrapping."""
    out.print(_plain(message, style), soft_wrap=True)


def print_answer(text: str, end: str = "\n") -> None:
    """Print a model's answer, with control characters escaped on a terminal and unchanged in a file or pipe."""
    if out.is_terminal:
        out.print(_plain(text), end=end, soft_wrap=True)
    else:
        out.file.write(text + end)
        out.file.flush()


def print_json(document: object) -> None:
    """Print the document of `--json` to standard output, with null for NaN and infinity, which JSON lacks."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(message: str) -> None:
    """Print a warning to standard error."""
    if not out.quiet:
        err.print(_plain(f"warning: {message}", "yellow"), soft_wrap=True)


def note(message: str) -> None:
    """Print a note to standard error, to keep it out of the command's output."""
    if not out.quiet:
        err.print(_plain(message, "dim"), soft_wrap=True)


def leave_to_first_rank() -> None:
    """On torchrun ranks other than 0, wait before printing an error, so that an error on all ranks is printed once.

    torchrun ends the other ranks when rank 0 fails. The function returns immediately on rank 0, and after the wait on
    ranks where rank 0 did not fail.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        with suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_TIMEOUT)


def fail(message: str) -> NoReturn:
    """Print an error to standard error, once for all ranks, and end the command with status 1."""
    leave_to_first_rank()
    err.print(_plain(f"{_prefix}error: {message}", "bold red"), soft_wrap=True)
    raise typer.Exit(1)


def command(*, resume: bool = False) -> str:
    """Return the current command line, with `--resume` if `resume` is set."""
    arguments = sys.argv[1:]
    if resume:
        arguments = [*(argument for argument in arguments if argument not in ("--resume", "--overwrite")), "--resume"]
    world_size = os.environ.get("WORLD_SIZE", "1")
    program = ["peftcore"]
    if world_size != "1":
        program = ["torchrun", "--nproc-per-node", world_size, "-m", "peftcore_cli"]
    return shlex.join([*program, *arguments])


def table(rows: Iterable[Iterable[Any]], columns: Iterable[str] = ("", ""), title: str | None = None) -> None:
    """Print a table. Cells are plain text."""
    if title is not None:
        say(title)  # rich would wrap the title at the width of the table
    columns = list(columns)
    grid = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(_plain(str(cell)) for cell in row))
    out.print(grid)


def require(*modules: str, extra: str | None = None) -> None:
    """Import libraries, so that a missing library is reported before the work begins.

    Args:
        modules: names of the modules.
        extra: extra of peftcore that installs the modules; None if each module is named like its package.

    Raises:
        PeftcoreError: a module is not installed. The message contains the command that installs it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = error.name if extra is None else f"peftcore[{extra}]"
            raise PeftcoreError(
                f"'{error.name}' is required but not installed. Install it: pip install {package}"
            ) from error
