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

EXAMPLES = ("peftcore convert-config theirs.yaml --output run.toml",)


def convert_config(
    file: Annotated[Path, typer.Argument(help="YAML file of axolotl, LLaMA-Factory or torchtune.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="TOML file; default: the screen.")] = None,
) -> None:
    """Convert a config of axolotl, LLaMA-Factory or torchtune into a file for `peftcore train --config`.

    Comments at the top name the keys that have no counterpart, with what to do instead.
    """
    text = converted(file)
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
    say(f"written. Train: peftcore train --config {output}")


def converted(file: Path) -> str:
    """Return a config in YAML as the text of a TOML file.

    Raises:
        PeftcoreError: the file cannot be read, or asks for a training that peftcore does not have.
    """
    require("yaml", extra="train")
    yaml: Any = importlib.import_module("yaml")
    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PeftcoreError(
            f"the file '{file}' does not exist. Pass a config of axolotl, LLaMA-Factory or torchtune"
        ) from None
    except OSError as error:
        raise PeftcoreError(f"the file '{file}' cannot be read: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise PeftcoreError(f"'{file}' cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise PeftcoreError(f"'{file}' must have keys with values, found {type(config).__name__}")
    found = convert(config)
    comments = [f"# {line}" for line in found.to_do]
    comments += [f"# not here: {key}. Instead: {instead}" for key, instead in found.left_out.items()]
    return "".join(f"{line}\n" for line in comments) + config_file.text({**found.options, "set": found.fields})
