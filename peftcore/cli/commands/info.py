"""`peftcore info`: the contents of an adapter folder, ours, PEFT's or another library's; the base is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.cli import completion, options
from peftcore.cli.console import table
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from torch import Tensor

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
    from peftcore.cli.bases.adapter_folders import refuse_other_folders
    from peftcore.engine.summary import megabytes
    from peftcore.errors import CheckpointError, PluginError
    from peftcore.files.folder import read_tensors
    from peftcore.files.metadata import BASE, VERSION, own_fields
    from peftcore.files.reading import fields_of_folder, method_of_folder
    from peftcore.files.single_file import parts_of_file
    from peftcore.plugin.peft_fields import config_of_fields, with_own
    from peftcore.plugin.safe_reading import CONFIG, TENSORS

    single = parts_of_file(adapter)
    if single is not None:
        name, parts = single
        table([("layout", name), *((part or "of one model", _counts(tensors)) for part, tensors in parts.items())])
        return
    refuse_other_folders(adapter)
    try:
        fields, foreign = fields_of_folder(adapter)
    except CheckpointError:
        read_tensors(adapter)  # `load` reads them first, and has their error
        raise
    tensors, metadata = read_tensors(adapter, foreign.tensors if foreign else TENSORS)
    own = own_fields(adapter, metadata)
    wrong = None
    try:
        found = method_of_folder(adapter)
        method = found.name
        if foreign is None:
            config_of_fields(f"'{adapter / CONFIG}'", found, with_own(f"'{adapter / TENSORS}'", found, fields, own))
    except PluginError as error:
        method = str(error)
    except CheckpointError as error:
        wrong = str(error)
    written_by = foreign.name if foreign else fields.get("peft_version") and f"PEFT {fields['peft_version']}"
    if VERSION in metadata:
        written_by = f"peftcore {metadata[VERSION]}"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    rows = [
        ("peft_type", fields["peft_type"]),
        ("method", method),
        *([("cannot be loaded", wrong)] if wrong is not None else []),
        ("task", fields.get("task_type") or "-"),
        ("base", fields.get("base_model_name_or_path") or "-"),
        *_base_in_training(adapter),
        ("base is checked on load", "yes" if BASE in metadata else "no: the file has no fingerprint"),
        ("written by", written_by or "-"),
        ("tensors", f"{len(tensors):,}, {', '.join(dtypes)}"),
        ("parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ("size", megabytes(sum(tensor.nbytes for tensor in tensors.values()))),
        *of_experts(fields, tensors),
    ]
    shown = {"peft_type", "task_type", "base_model_name_or_path", "peft_version", "inference_mode"}
    rows += [
        (f"  {name}", ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in sorted({**own, **fields}.items())
        if name not in shown and value not in (None, False, "", [], {})
    ]
    table(rows)


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


def _counts(tensors: Mapping[str, Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{len(tensors):,} tensors, {', '.join(dtypes)}, {numbers:,} parameters"


def of_experts(fields: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return rows about parameters `[experts, out, in]`, which are adapted by name: A is `[experts · r, in]`."""
    from peftcore.model.targets import pattern_value

    given = fields.get("target_parameters")
    by_module: dict[str, list[str]] = {}
    for name in given if isinstance(given, list) else ():
        if isinstance(name, str):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    counts: set[int] = set()
    modules: set[str] = set()
    held = 0
    for key, tensor in tensors.items():
        whole = key.removeprefix("base_model.model.").removesuffix(".weight").replace(".base_layer", "")
        path, _, part = whole.rpartition(".")
        words = path.split(".")
        inside = [name for i in range(len(words)) for name in by_module.get(".".join(words[i:]), ())]
        if not inside:
            continue
        modules.add(path)
        held += tensor.numel()
        full = (f"{path}.{name.rpartition('.')[2]}" for name in inside)
        ranks = {pattern_value(fields.get("rank_pattern"), name, fields.get("r")) for name in full}
        r = ranks.pop()
        if part.endswith("_A") and not ranks and type(r) is int and r > 0:
            counts.add(tensor.shape[0] // r)
    if not modules or counts == {1}:
        return []
    each = f" of {', '.join(map(str, sorted(counts)))}" if counts else ""
    share = 100 * held / sum(tensor.numel() for tensor in tensors.values())
    return [("experts", f"{len(modules)} modules{each}, {held:,} of the parameters ({share:.3g} %)")]
