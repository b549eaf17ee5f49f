"""`peftcore info`: the contents of an adapter folder, ours, PEFT's or another library's; the base is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peftcore.cli import options
from peftcore.cli.console import table
from peftcore.errors import PeftcoreError

EXAMPLES = ("peftcore info run",)


def info(
    adapter: Annotated[Path, options.adapter_argument("Folder of an adapter or a run, or a single file.")],
) -> None:
    """Show an adapter's method, config, base and size."""
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
