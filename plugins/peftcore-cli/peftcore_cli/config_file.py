"""`--config run.toml`: options of a command from a file, and the file that a run writes to be repeated.

Keys are option names, `batch_size` or `batch-size`; the table `[set]` has fields of the method's config. The command
line takes precedence over the file, for `[set]` field by field.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import typer

from peftcore.errors import nearest
from peftcore_cli.console import warn
from peftcore_cli.fields import text_of

NAME = "run.toml"
RUN_FILE = "run.json"
_FIELDS = "peftcore_cli.fields"  # key in the context: the file's `[set]`
_RESUMED = "peftcore_cli.resumed"  # key in the context: values of --output and --resume
_NOT_IN_FILES = {"config", "help"}
# If the command line gives the first option, the file's second, which would override it, is ignored.
_OVERRULED = {"epochs": "steps", "holdout": "eval_data"}
_Given = TypeVar("_Given", bound=Any)  # a dataclass


def use(context: typer.Context, _param: typer.CallbackParam, file: Path | None) -> Path | None:
    """Use the file's options as defaults of the command (callback of `--config`).

    Raises:
        typer.BadParameter: the file cannot be read, a key is not an option, or a value has the wrong type.
    """
    if file is None or context.resilient_parsing:
        return file
    options = {_key(option): option for option in context.command.params if option.name not in _NOT_IN_FILES}
    defaults = {}
    for name, value in _read(file).items():
        key = name.replace("-", "_")
        if key not in options:
            raise typer.BadParameter(f"{file}: there is no option '{name}'{nearest(key, options)}")
        option = options[key]
        if key == "set" and isinstance(value, dict):
            context.meta[_FIELDS] = {field: text_of(given) for field, given in value.items()}
        else:
            defaults[str(option.name)] = _default(f"{file}: '{name}'", context, option, value)
    context.default_map = defaults
    return file


def use_of_run(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Use the options of the run in `--output` as defaults if `--resume` continues it (callback of both options).

    A file of `--config` comes first. An empty folder is a run that has not begun, for jobs that are started again.

    Raises:
        typer.BadParameter: there is no run in the folder, or its `run.toml` cannot be used.
    """
    if context.resilient_parsing:
        return value
    known = context.meta.setdefault(_RESUMED, {})
    known[param.name] = value
    if not known.get("resume") or known.get("output") is None:
        return value
    output = Path(known["output"])
    known.clear()  # `use` processes --output again, as it does every option of the file
    if (output / RUN_FILE).exists():
        if (output / NAME).exists() and not context.default_map:
            use(context, param, output / NAME)
    elif not (output.is_dir() and not any(output.iterdir())):
        siblings = [each.parent.name for each in output.absolute().parent.glob(f"*/{RUN_FILE}")]
        what = f"has no {RUN_FILE}" if output.exists() else "does not exist"
        raise typer.BadParameter(
            f"there is no run to resume: '{output}' {what}{nearest(output.name, siblings)}. Correct --output, or leave "
            "out --resume. A job that is started again with the same command makes an empty folder first: mkdir -p "
            f"{shlex.quote(str(output))}"
        )
    return value


def fields(context: typer.Context, settings: list[str] | None) -> list[str]:
    """Return the fields of `--set`, NAME=VALUE, including the file's that the command line does not give."""
    settings = settings or []
    said = {setting.partition("=")[0].strip() for setting in settings}
    from_file: dict[str, str] = context.meta.get(_FIELDS, {})
    return [*settings, *(f"{name}={value}" for name, value in from_file.items() if name not in said)]


def in_force(context: typer.Context, given: _Given) -> _Given:
    """Return `given` without options of the file that the command line overrides through another option."""

    def source(name: str) -> str:
        return getattr(context.get_parameter_source(name), "name", "")

    overruled = [
        name for by, name in _OVERRULED.items() if source(by) == "COMMANDLINE" and source(name) == "DEFAULT_MAP"
    ]
    return dataclasses.replace(given, **dict.fromkeys(overruled)) if overruled else given


def text(options: Mapping[str, Any]) -> str:
    """Return options as a file for `--config`, without those that are None. `set` becomes a table."""
    shown = {name: value for name, value in options.items() if value is not None and name != "set"}
    lines = [f"{name} = {_toml(value)}" for name, value in shown.items()]
    if options.get("set"):
        lines += ["", "[set]", *(f"{_toml_key(name)} = {_toml(value)}" for name, value in options["set"].items())]
    return "\n".join(lines) + "\n"


def write(file: Path, options: Mapping[str, Any]) -> None:
    """Write options as a file for `--config`."""
    try:
        written = text(options).encode()
    except UnicodeEncodeError as error:  # a path that is not UTF-8, which TOML cannot represent
        warn(f"'{file}' is not written: {error.object[error.start : error.end]!r} is not UTF-8")
        return
    file.write_bytes(written)


def _read(file: Path) -> dict[str, Any]:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        tomllib = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"TOML files need '{name}' before Python 3.11. Install it: pip install {name}"
        ) from error
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise typer.BadParameter(f"'{file}' cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise typer.BadParameter(f"'{file}' cannot be used: it is nested too deeply") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise typer.BadParameter(f"'{file}' is not TOML: {error}") from error


def _key(option: Any) -> str:
    """Return the option's long name, as a file spells it."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def _default(what: str, context: typer.Context, option: Any, value: Any) -> Any:
    """Convert a value of the file to the option's type, through text, so that 8.5 is not a whole number."""
    scalar: tuple[type, ...] = (bool,) if option.is_flag else (str, int, float)
    values = value if option.multiple and isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, scalar) or isinstance(each, bool) != option.is_flag:
            takes = "true or false" if option.is_flag else "text or a number"
            raise typer.BadParameter(f"{what} takes {takes}, found {each!r}")
    values = [each if option.is_flag else text_of(each) for each in values]
    default = values if option.multiple else values[0]
    try:
        option.process_value(context, default)
    except Exception as error:  # click's exception; typer may bundle its own copy
        raise typer.BadParameter(f"{what}: {getattr(error, 'message', error)}") from error
    return default


def _toml(value: Any) -> str:
    """Format a value as TOML; None, which TOML does not have, as for --set."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value) if not math.isfinite(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _quoted("none" if value is None else str(value))


def _toml_key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(str(key))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
