"""`--config run.toml`: read the options of a command from a file, and write such a file for each run.

Keys are option names, `batch_size` or `batch-size`; the table `[set]` has fields of the method's config. Options on the
command line take precedence over the file; in `[set]`, field by field.
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

from peftcore.errors import CheckpointError, nearest
from peftcore_cli.console import warn
from peftcore_cli.fields import text_of

NAME = "run.toml"
RUN_FILE = "run.json"
_FIELDS = "peftcore_cli.fields"  # key in the context: the file's `[set]`
_RESUME_VALUES = "peftcore_cli.resumed"  # key in the context: values of --output and --resume
_NOT_IN_FILES = {"config", "help"}
# If the first option is on the command line, the second one in the file is ignored, because it would take precedence.
_OVERRIDES = {"epochs": "steps", "holdout": "eval_data"}
_Options = TypeVar("_Options", bound=Any)  # a dataclass


def use(context: typer.Context, _param: typer.CallbackParam, file: Path | None) -> Path | None:
    """Use the file's options as defaults of the command (callback of `--config`).

    Raises:
        typer.BadParameter: the file cannot be read, a key is not an option, or a value has the wrong type.
    """
    if file is not None and not context.resilient_parsing:
        _use_options(context, file, _parse(file, _read(file)))
    return file


def _use_options(context: typer.Context, file: Path, values: dict[str, Any]) -> None:
    """Use `values`, read from `file`, as defaults of the command."""
    options = {_key(option): option for option in context.command.params if option.name not in _NOT_IN_FILES}
    defaults = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in options:
            raise typer.BadParameter(f"{file}: unknown option '{name}'{nearest(key, options)}")
        option = options[key]
        if key == "set" and isinstance(value, dict):
            context.meta[_FIELDS] = {field: text_of(field_value) for field, field_value in value.items()}
        else:
            defaults[str(option.name)] = _default(f"{file}: '{name}'", context, option, value)
    context.default_map = defaults


def use_of_run(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Use the options of the run in `--output` as defaults with `--resume` (callback of both options).

    A file passed as `--config` takes precedence. An empty folder counts as a run that has not started, so that jobs can
    always be submitted with `--resume`.

    Raises:
        typer.BadParameter: there is no run in the folder, or its `run.toml` cannot be used.
    """
    if context.resilient_parsing:
        return value
    resume_values = context.meta.setdefault(_RESUME_VALUES, {})
    resume_values[param.name] = value
    if not resume_values.get("resume") or resume_values.get("output") is None:
        return value
    output = Path(resume_values["output"])
    resume_values.clear()  # `use` processes --output again, like every option in the file
    if (output / RUN_FILE).exists():
        if (output / NAME).exists() and not context.default_map:
            _use_options(context, output / NAME, _parse(output / NAME, _read_run_file(output / NAME)))
    elif not (output.is_dir() and not any(output.iterdir())):
        siblings = [run_file.parent.name for run_file in output.absolute().parent.glob(f"*/{RUN_FILE}")]
        problem = f"has no {RUN_FILE}" if output.exists() else "does not exist"
        raise typer.BadParameter(
            f"there is no run to resume: '{output}' {problem}{nearest(output.name, siblings)}. Correct --output, or "
            "remove --resume. To submit a job that can be restarted with the same command, create the folder first: "
            f"mkdir -p {shlex.quote(str(output))}"
        )
    return value


def fields(context: typer.Context, settings: list[str] | None) -> list[str]:
    """Return the NAME=VALUE settings of `--set`, and those of the file that the command line does not override."""
    settings = settings or []
    names_on_command_line = {setting.partition("=")[0].strip() for setting in settings}
    from_file: dict[str, str] = context.meta.get(_FIELDS, {})
    return [*settings, *(f"{name}={value}" for name, value in from_file.items() if name not in names_on_command_line)]


def in_force(context: typer.Context, options: _Options) -> _Options:
    """Return `options` without file options that are overridden by a different option on the command line."""

    def source(name: str) -> str:
        return getattr(context.get_parameter_source(name), "name", "")

    overridden = [
        name
        for overriding, name in _OVERRIDES.items()
        if source(overriding) == "COMMANDLINE" and source(name) == "DEFAULT_MAP"
    ]
    return dataclasses.replace(options, **dict.fromkeys(overridden)) if overridden else options


def text(options: Mapping[str, Any]) -> str:
    """Format options as TOML for `--config`, without options that are None. `set` becomes a table."""
    scalars = {name: value for name, value in options.items() if value is not None and name != "set"}
    lines = [f"{name} = {_toml(value)}" for name, value in scalars.items()]
    if options.get("set"):
        lines += ["", "[set]", *(f"{_toml_key(name)} = {_toml(value)}" for name, value in options["set"].items())]
    return "\n".join(lines) + "\n"


def write(file: Path, options: Mapping[str, Any]) -> None:
    """Write options as a file for `--config`."""
    try:
        content = text(options).encode()
    except UnicodeEncodeError as error:  # a path that is not UTF-8, which TOML cannot represent
        warn(f"cannot write '{file}': {error.object[error.start : error.end]!r} is not valid UTF-8")
        return
    file.unlink(missing_ok=True)  # writing into a pipe would block
    file.write_bytes(content)


def _read(file: Path) -> bytes:
    """Return the content of a file that the user named, which may be a pipe such as /dev/stdin."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"cannot read '{file}': {error.strerror or error}") from error


def _read_run_file(file: Path) -> bytes:
    """Return the content of a run's file. The run may come from someone else, so a pipe or a device is refused."""
    from peftcore.plugin import safe_reading  # imports PyTorch, which --help must not

    try:
        return bytes(safe_reading.read_bytes(file, safe_reading.JSON_BYTES))
    except CheckpointError as error:
        raise typer.BadParameter(f"{error}. Remove --resume, or correct --output") from error


def _parse(file: Path, content: bytes) -> dict[str, Any]:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        tomllib = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"reading TOML files needs '{name}' on Python versions before 3.11. Install it: pip install {name}"
        ) from error
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise typer.BadParameter(f"cannot read '{file}': the file is nested too deeply") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise typer.BadParameter(f"'{file}' is not valid TOML: {error}") from error


def _key(option: Any) -> str:
    """Return the option's long name, as it is written in a file."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def _default(location: str, context: typer.Context, option: Any, value: Any) -> Any:
    """Convert a value of the file to text and then to the option's type, so that 8.5 is refused as an integer."""
    scalar: tuple[type, ...] = (bool,) if option.is_flag else (str, int, float)
    values = value if option.multiple and isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, scalar) or isinstance(item, bool) != option.is_flag:
            takes = "true or false" if option.is_flag else "text or a number"
            raise typer.BadParameter(f"{location} takes {takes}, found {item!r}")
    values = [item if option.is_flag else text_of(item) for item in values]
    default = values if option.multiple else values[0]
    try:
        option.process_value(context, default)
    except Exception as error:  # click's exception; typer may bundle its own copy
        raise typer.BadParameter(f"{location}: {getattr(error, 'message', error)}") from error
    return default


def _toml(value: Any) -> str:
    """Format a value as TOML. TOML has no null, so None becomes "none", as in --set."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value) if not math.isfinite(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _quote("none" if value is None else str(value))


def _toml_key(key: Any) -> str:
    return key if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quote(str(key))


def _quote(text: str) -> str:
    escaped_text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", escaped_text) + '"'
