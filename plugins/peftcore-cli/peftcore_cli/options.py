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

FULL = "full"  # value of --method for full fine-tuning, the reference of a comparison


def in_run(folder: Path | None) -> Path | None:
    """Return the adapter's folder. `folder` may also be the folder of a run."""
    from peftcore_cli.bases.adapter_folders import adapter_folder

    return None if folder is None else adapter_folder(folder)


def adapter_argument(help: str) -> Any:
    """Return the declaration of the argument ADAPTER, the folder of an adapter or a run."""
    return typer.Argument(metavar="ADAPTER", callback=in_run, autocompletion=completion.adapters, help=help)


Model = Annotated[str, typer.Option("--model", "-m", help="Base model: hub id, folder, or .gguf file.")]
MaybeModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Base model: hub id, folder, or .gguf file; default: the adapter's base with --adapter.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=("Base model: hub id, folder, or .gguf file; default: the base that the adapter was trained on."),
    ),
]
Adapter = Annotated[
    Path,
    adapter_argument(
        "Folder of an adapter or a run, in the format of peftcore, PEFT, or a library that a plugin supports."
    ),
]
MaybeAdapter = Annotated[Path | None, adapter_argument("Folder of an adapter or a run; default: the base alone.")]
ContinuedAdapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        "-a",
        callback=in_run,
        autocompletion=completion.adapters,
        rich_help_panel=option_groups.MODEL,
        help="Folder of an adapter or a run to continue training from, in a new run.",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help=(
            "Data: a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files, or a hub dataset "
            "(ORG/NAME@SPLIT). Can be repeated. For training, FILE:2 doubles the weight of a file."
        ),
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=config_file.use,
        rich_help_panel=option_groups.OUTPUT,
        help="TOML file with options, such as RUN/run.toml; options on the command line take precedence.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD=COLUMN",
        rich_help_panel=option_groups.DATA,
        help="Map fields to columns, such as prompt=question,completion=answer.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.DATA,
        help="Chat template: chatml or a template file; default: the tokenizer's template.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        autocompletion=completion.methods,
        help="Fine-tuning method (`peftcore methods` lists them); optional if only one is installed.",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a field of the method's config, such as r=16. Repeatable."),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="Dtype of the base: fp32, bf16, or auto (bf16 on GPUs that support it; on CPUs the checkpoint's dtype, or "
        "fp32 where bf16 is slow).",
    ),
]
WrittenDtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="Dtype of the base: fp32, bf16, or auto (bf16 on GPUs that support it, otherwise fp32).",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.MEMORY,
        help="Data parallelism under torchrun: ddp (replicate the base) or fsdp2 (shard it).",
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", rich_help_panel=option_groups.MEMORY, help="Number of processes; figures are per process."
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp-size",
        min=1,
        metavar="N",
        rich_help_panel=option_groups.MEMORY,
        help="Tensor-parallel size: the number of processes that share each layer.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="4-bit format of the base, such as nf4, or none for a dense base; default: the format used in training.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=option_groups.MODEL,
        help=(
            "Run Python code from the model's repository, for models that are not in transformers. The code runs "
            "with your permissions, so read it first."
        ),
    ),
]
Device = Annotated[str, typer.Option(rich_help_panel=option_groups.MEMORY, help="Device: cpu, cuda, cuda:1, or auto.")]
Task = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=option_groups.TASK,
        help=(
            "Task: causal-lm, seq2seq, classification, regression, multi-label, tags, image, image-text, audio-text, "
            "pairs, asr, dpo, image-dpo, kto, orpo, reward, grpo, or a task from a plugin (`peftcore plugins` lists "
            "all); default: inferred from the columns of the examples."
        ),
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        rich_help_panel=option_groups.TASK,
        help="Class labels of a classifier trained with PEFT, in the order of its outputs.",
    ),
]
PlannedLabels = Annotated[
    str | None,
    typer.Option(
        "--labels", metavar="A,B,...", rich_help_panel=option_groups.TASK, help=("Class labels of a classifier.")
    ),
]
PlannedData = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        help="Examples from which to infer the task, image and audio sizes, and the number of texts. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Maximum number of tokens per example; default: the value used in training."),
]


def names_of(labels: str | None) -> tuple[str, ...]:
    """Split the names in `--labels` at commas."""
    return tuple(part.strip() for part in labels.split(",")) if labels else ()


def planned_task(task: str | None, data: Sequence[str] | None, labels: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the task and the labels of a planned run, which may have no examples yet.

    Raises:
        PeftcoreError: the task is unknown, or a data file is invalid.
    """
    from peftcore_cli.data import row_reading
    from peftcore_cli.tasks import registered

    if task is None and data:
        task = row_reading.guess_task(data)
    return registered.find(task or registered.default_name(labels)).name, names_of(labels)


def resolve_method(
    name: str | None, settings: list[str] | None, *, adapter_fields: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the method's name, and its fields from `--set` and the adapter that training continues from.

    Raises:
        PeftcoreError: the method is not installed, no method is named and several are installed, or a field is invalid.
    """
    import peftcore
    from peftcore_cli.fields import parse

    if name is None:
        installed_methods = peftcore.methods()
        if len(installed_methods) != 1:
            names = ", ".join(installed_methods) or "none; see peftcore plugins"
            raise PluginError(f"no method was given. Pass --method NAME (installed: {names})")
        name = next(iter(installed_methods))
    method = peftcore.method(name)
    set_fields = parse(method.config_class, settings or [])
    if set_fields and not adapter_fields:  # the files of an adapter are checked when they are read
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `apply` raises them
            peftcore.config(method.name, **set_fields)
    return method.name, {**(adapter_fields or {}), **set_fields}


def absolute_data(paths: Sequence[str]) -> str | list[str]:
    """Make the paths of `--data` absolute. Return a single path as a string, several as a list, with their weights."""
    absolute_paths = []
    for text in paths:
        path = mixture.parse(text).path
        absolute_paths.append(absolute(path) + text[len(path) :])
    return absolute_paths[0] if len(absolute_paths) == 1 else absolute_paths


def absolute(path: str) -> str:
    """Make an existing path absolute. Anything else (a hub id, `chatml`) is returned unchanged."""
    if "{" in path:  # the text of a template
        return path
    expanded_path = Path(os.path.expanduser(path))
    return str(expanded_path.resolve()) if os.path.exists(expanded_path) else path
