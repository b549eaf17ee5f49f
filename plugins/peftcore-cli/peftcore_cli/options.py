"""Options that several commands share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.errors import PluginError
from peftcore_cli import completion, config_file, option_groups
from peftcore_cli.data import mixture

FULL = "full"  # in place of a method: full fine-tuning, as the reference of a comparison


def in_run(folder: Path | None) -> Path | None:
    """Return the adapter's folder, which may be named by the run that made it."""
    from peftcore_cli.bases.adapter_folders import adapter_folder

    return None if folder is None else adapter_folder(folder)


def adapter_argument(help: str) -> Any:
    """Return the argument ADAPTER, the folder of one adapter or run."""
    return typer.Argument(metavar="ADAPTER", callback=in_run, autocompletion=completion.adapters, help=help)


Model = Annotated[str, typer.Option("--model", "-m", help="Base model: hub id, folder, or .gguf file.")]
MaybeModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Base model: hub id, folder, or .gguf file; with --adapter only if it moved."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Base model; default: the one that the adapter names."),
]
Adapter = Annotated[
    Path, adapter_argument("Folder of an adapter or a run: peftcore's, PEFT's or of a library that a plugin reads.")
]
MaybeAdapter = Annotated[Path | None, adapter_argument("Folder of an adapter or a run; without it, the base is used.")]
Continued = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        "-a",
        callback=in_run,
        autocompletion=completion.adapters,
        rich_help_panel=option_groups.MODEL,
        help="Folder of an adapter or a run to go on training, as a new run.",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="Examples: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a dataset's hub id "
        "(ORG/NAME@SPLIT). Repeatable; in training, FILE:2 counts twice.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=config_file.use,
        rich_help_panel=option_groups.OUTPUT,
        help="TOML file of options, such as RUN/run.toml; options of the command line take precedence.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD=COLUMN",
        rich_help_panel=option_groups.DATA,
        help="Columns with other names, such as prompt=question,completion=answer.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.DATA,
        help="Template that turns messages into text: chatml, or a file; default: the tokenizer's.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        autocompletion=completion.methods,
        help="Fine-tuning method, one that `peftcore methods` lists; optional if only one is installed.",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Field of the method's config, such as r=16. Repeatable."),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="Dtype of the base: fp32, bf16, or auto (bf16 on a GPU that has it; on a CPU the checkpoint's, or fp32 if "
        "bf16 is slow there).",
    ),
]
WrittenDtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="Dtype of the base: fp32, bf16, or auto (bf16 on a GPU that has it, else fp32).",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="How torchrun's processes share the base: ddp (each has a copy) or fsdp2 (shards).",
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", rich_help_panel=option_groups.MEMORY, help="Number of processes; sizes are those of one."
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp-size",
        min=1,
        metavar="N",
        rich_help_panel=option_groups.MEMORY,
        help="Number of processes that share each layer (tensor parallelism).",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="4-bit format of the base, such as nf4, or none for dense; default: as in training.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=option_groups.MODEL,
        help="Run the Python code in the model's repository, for models that are not in transformers. The code can do "
        "all that you can do: read it first.",
    ),
]
Device = Annotated[str, typer.Option(rich_help_panel=option_groups.MEMORY, help="Device: cpu, cuda, cuda:1, or auto.")]
Task = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.TASK,
        help="causal-lm, seq2seq, classification, regression, multi-label, tags, image, image-text, audio-text, pairs, "
        "asr, dpo, image-dpo, kto, orpo, reward, grpo, or a task of another package; default: recognised by the "
        "columns of the examples.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        rich_help_panel=option_groups.TASK,
        help="Labels of a classifier that PEFT trained, in the order of its outputs.",
    ),
]
PlannedLabels = Annotated[
    str | None,
    typer.Option("--labels", metavar="A,B,...", rich_help_panel=option_groups.TASK, help="Labels of a classifier."),
]
PlannedData = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        help="Examples, from which the task, images, audio and numbers of texts are read. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Maximum number of tokens per example; default: as in training."),
]


def names_of(labels: str | None) -> tuple[str, ...]:
    """Return the names in `--labels`, separated by commas."""
    return tuple(part.strip() for part in labels.split(",")) if labels else ()


def planned_task(task: str | None, data: Sequence[str] | None, labels: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the task and the labels of a run that is planned, perhaps before there are examples.

    Raises:
        PeftcoreError: the task is not known, or a file of examples is wrong.
    """
    from peftcore_cli.data import row_reading
    from peftcore_cli.tasks import registered

    if task is None and data:
        task = row_reading.guess_task(data)
    return registered.find(task or registered.without_a_name(labels)).name, names_of(labels)


def resolve_method(
    name: str | None, settings: list[str] | None, *, before: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the method's name and the fields that `--set` gives to it, with those of an adapter, `before`.

    Raises:
        PeftcoreError: the method is not installed, is not named although several are, or a field is wrong.
    """
    import peftcore
    from peftcore_cli.fields import parse

    if name is None:
        installed = peftcore.methods()
        if len(installed) != 1:
            names = ", ".join(installed) or "none; see peftcore plugins"
            raise PluginError(f"no method is given. Pass --method NAME (installed: {names})")
        name = next(iter(installed))
    method = peftcore.method(name)
    found = parse(method.config_class, settings or [])
    if found and not before:  # the files of an adapter are checked when they are read
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `apply` raises them
            peftcore.config(method.name, **found)
    return method.name, {**(before or {}), **found}


def absolute_data(paths: Sequence[str]) -> str | list[str]:
    """Return the paths of `--data` as absolute ones with their weights: one as text, several as a list."""
    found = []
    for text in paths:
        path = mixture.parsed(text).path
        found.append(absolute(path) + text[len(path) :])
    return found[0] if len(found) == 1 else found


def absolute(path: str) -> str:
    """Return a path as an absolute one; anything else (a hub id, `chatml`) unchanged."""
    if "{" in path:  # the text of a template
        return path
    where = Path(os.path.expanduser(path))
    return str(where.resolve()) if os.path.exists(where) else path
