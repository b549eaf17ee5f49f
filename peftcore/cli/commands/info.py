"""`peftcore info`: the contents of an adapter folder, ours, PEFT's or another library's; the base is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcore.cli import completion, options
from peftcore.cli.console import table
from peftcore.errors import PeftcoreError

EXAMPLES = ("peftcore info run",)


def info(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ADAPTER]",
            help="Folder of an adapter or a run, or a single file.",
            callback=options.in_run,
            autocompletion=completion.adapters,
        ),
    ] = None,
    *,
    adapter: Annotated[Path | None, options.adapter_folder_option("Like the argument.")] = None,
) -> None:
    """Show an adapter's method, config, base and size."""
    if (folder is None) == (adapter is None):
        raise PeftcoreError("info shows one adapter. Pass its folder: peftcore info FOLDER")
    _show(adapter or folder or Path())


def _show(adapter: Path) -> None:
    import peftcore
    from peftcore.cli.bases.adapter_folders import refuse_other_folders

    refuse_other_folders(adapter)
    rows = peftcore.inspect(adapter).rows()
    after = next((index + 1 for index, (label, _) in enumerate(rows) if label == "base"), len(rows))
    table([*rows[:after], *_base_in_training(adapter), *rows[after:]])


def _base_in_training(folder: Path) -> list[tuple[str, str]]:
    """Return a row that says how the base was quantized in training, if the folder has a record of that."""
    from peftcore.cli.bases.adapter_folders import TASK_FILE, adapter_task

    if not (folder / TASK_FILE).is_file():
        return []
    try:
        record = adapter_task(folder).quantized
    except PeftcoreError as error:
        return [(f"{TASK_FILE} is wrong", str(error))]
    return [] if record is None else [("base in training", f"quantized as {record}")]
