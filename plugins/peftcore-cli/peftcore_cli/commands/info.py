"""`peftcore info`: the contents of an adapter folder, ours, PEFT's or another library's; the base is not needed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import table

if TYPE_CHECKING:
    from peftcore import AdapterInfo

EXAMPLES = ("peftcore info run",)


def info(
    adapter: Annotated[Path, options.adapter_argument("Folder of an adapter or a run, or a single file.")],
    as_json: options.Json = False,
) -> object:
    """Show an adapter's method, config, base and size."""
    import peftcore
    from peftcore_cli.bases.adapter_folders import refuse_other_folders

    refuse_other_folders(adapter)
    found = peftcore.inspect(adapter)
    if as_json:
        return _document(found)
    rows = found.rows()
    after = next((index + 1 for index, (label, _) in enumerate(rows) if label == "base"), len(rows))
    table([*rows[:after], *_base_in_training(adapter), *rows[after:]])
    return None


def _document(found: AdapterInfo) -> dict[str, object]:
    from peftcore_cli.bases.adapter_folders import TASK_FILE, adapter_task

    problem, trained_for = found.problem, None
    if (found.path / TASK_FILE).is_file():
        try:
            trained_for = asdict(adapter_task(found.path))
        except PeftcoreError as error:
            problem = problem or error
    tensors = {
        part: {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in held.items()}
        for part, held in found.parts.items()
    }
    return {
        "path": str(found.path),
        "format": found.format,
        "peft_type": found.peft_type,
        "method": found.method,
        "problem": None if problem is None else str(problem),
        "base": found.base,
        "base_is_checked": found.base_is_checked,
        "task_type": found.task_type,
        "fields": found.fields,
        "writer": found.writer,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "parts": tensors,
        "trained_for": trained_for,
    }


def _base_in_training(folder: Path) -> list[tuple[str, str]]:
    """Return a row that says how the base was quantized in training, if the folder has a record of that."""
    from peftcore_cli.bases.adapter_folders import TASK_FILE, adapter_task

    if not (folder / TASK_FILE).is_file():
        return []
    try:
        record = adapter_task(folder).quantized
    except PeftcoreError as error:
        return [(f"{TASK_FILE} is wrong", str(error))]
    return [] if record is None else [("base in training", f"quantized as {record}")]
