"""`peftcore info`: describe an adapter folder in any supported format, without loading the base."""

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
    adapter_info = peftcore.inspect(adapter)
    if as_json:
        return _document(adapter_info)
    rows = adapter_info.rows()
    labels = [label for label, _ in rows]
    after_base = labels.index("base") + 1 if "base" in labels else len(rows)
    table([*rows[:after_base], *_base_in_training(adapter), *rows[after_base:]])
    return None


def _document(adapter_info: AdapterInfo) -> dict[str, object]:
    from peftcore_cli.bases.adapter_folders import TASK_FILE, adapter_task

    problem, trained_for = adapter_info.problem, None
    if (adapter_info.path / TASK_FILE).is_file():
        try:
            trained_for = asdict(adapter_task(adapter_info.path))
        except PeftcoreError as error:
            problem = problem or error
    parts: dict[str, dict[str, object]] = {}
    for part, tensors in adapter_info.parts.items():
        parts[part] = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
    return {
        "path": str(adapter_info.path),
        "format": adapter_info.format,
        "peft_type": adapter_info.peft_type,
        "method": adapter_info.method,
        "problem": None if problem is None else str(problem),
        "base": adapter_info.base,
        "base_is_checked": adapter_info.base_is_checked,
        "task_type": adapter_info.task_type,
        "fields": adapter_info.fields,
        "writer": adapter_info.writer,
        "parameters": adapter_info.parameters,
        "bytes": adapter_info.bytes,
        "parts": parts,
        "trained_for": trained_for,
    }


def _base_in_training(folder: Path) -> list[tuple[str, str]]:
    """Return a row with the base's quantization in training, if the folder records it."""
    from peftcore_cli.bases.adapter_folders import TASK_FILE, adapter_task

    if not (folder / TASK_FILE).is_file():
        return []
    try:
        record = adapter_task(folder).quantized
    except PeftcoreError as error:
        return [(f"{TASK_FILE} is invalid", str(error))]
    return [] if record is None else [("base in training", f"quantized as {record}")]
