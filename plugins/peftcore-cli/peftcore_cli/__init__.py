"""The command `peftcore`, and the public names for packages that add commands or tasks.

A package that adds a task subclasses `Task`. A package that adds a command can import the modules that peftcore's own
commands share:

    modules of options      options, completion, config_file, settings
    modules of output       console, amounts, chart
    tasks and their rows    Task, Evaluation, Metrics, Example, Encoded, Row, Messages; registered, metrics,
                            conversations, text_generation; row_reading, data_files
    adapter folders         AdapterTask, Quantization; adapter_folders
    base models             models, base_files, base_and_adapter, base_quantization, dtype_choice, device_choice
    training runs           training_run, training_data, run_result

Names are imported when first used, so that `peftcore --help` answers before PyTorch is loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import peftcore_cli.start  # noqa: F401  # the clock of a run starts here

# {module: its public names}. `__init__.pyi` lists the same names for type checkers, and `tests/test_public_use.py`
# compares the two.
_PUBLIC = {
    "peftcore_cli": "amounts completion config_file console options settings",
    "peftcore_cli.bases": "adapter_folders base_and_adapter base_files base_quantization device_choice dtype_choice "
    "models",
    "peftcore_cli.bases.adapter_folders": "AdapterTask Quantization",
    "peftcore_cli.data": "data_files row_reading",
    "peftcore_cli.data.row": "Messages Row",
    "peftcore_cli.tasks": "conversations metrics registered text_generation",
    "peftcore_cli.tasks.encoded_examples": "Encoded Example",
    "peftcore_cli.tasks.metrics": "Metrics",
    "peftcore_cli.tasks.task": "Evaluation Task",
    "peftcore_cli.training": "chart run_result training_data training_run",
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftcore_cli' has no attribute '{name}'")
    home = _HOMES[name]
    value = import_module(f"{home}.{name}") if name.islower() else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)


def main() -> None:
    """Run the command line; if its libraries are not installed, print how to install them."""
    try:
        from peftcore_cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"peftcore: the command line needs '{error.name}'. Install it: pip install {error.name}")
    run()
