"""`peftcore convert-config`: a config of axolotl, LLaMA-Factory or torchtune as options of `peftcore train`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.cli import config_file
from peftcore.cli.console import note, require, say
from peftcore.plugin import PeftcoreError
from peftcore_convert_config.programs import convert

_PASS = "Pass a config of axolotl, LLaMA-Factory or torchtune in YAML"
EXAMPLES = ("peftcore convert-config theirs.yaml --output run.toml",)


def convert_config(
    file: Annotated[Path, typer.Argument(help="YAML file of axolotl, LLaMA-Factory or torchtune.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="TOML file, or shell script; default: the screen.")
    ] = None,
) -> None:
    """Convert a config of axolotl, LLaMA-Factory or torchtune into a file for `peftcore train --config`.

    Comments at the top name the keys that have no counterpart, with what to do instead. A config that merges or answers
    examples becomes a line of the shell with `peftcore merge` or `peftcore eval`.
    """
    text, command = converted(file)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists():
        raise PeftcoreError(f"'{output}' exists already. Pass another file: --output FILE")
    output.write_text(text, encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        note(line.removeprefix("# "))
    say(f"written. {f'Train: peftcore train --config {output}' if command == 'train' else f'Run: sh {output}'}")


def converted(file: Path) -> tuple[str, str]:
    """Return a config in YAML as the text of a TOML file, or a line of the shell, and the command that it is for.

    Raises:
        PeftcoreError: the file cannot be read, or asks for a training that peftcore does not have.
    """
    require("yaml", extra="train")
    yaml: Any = importlib.import_module("yaml")
    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PeftcoreError(f"the file '{file}' does not exist. {_PASS}") from None
    except OSError as error:
        raise PeftcoreError(f"the file '{file}' cannot be read: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise PeftcoreError(f"'{file}' cannot be read as YAML: {error}\n{_PASS}") from error
    if not isinstance(config, dict):
        raise PeftcoreError(f"'{file}' must have keys with values, found {type(config).__name__}. {_PASS}")
    found = convert(config)
    comments = [f"# {line}" for line in found.to_do]
    comments += [f"# not here: {key}. Instead: {instead}" for key, instead in found.left_out.items()]
    options = {**found.options, "set": found.fields}
    text = config_file.text(options) if found.command == "train" else f"{found.line()}\n"
    return "".join(f"{line}\n" for line in comments) + text, found.command
