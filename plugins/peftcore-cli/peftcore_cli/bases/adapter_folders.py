"""Adapter folders: the task that an adapter was trained for, and its base."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.plugin import safe_reading, validation
from peftcore_cli.tasks import registered

if TYPE_CHECKING:
    from peftcore import AdapterInfo

TASK_FILE = "peftcore_task.json"
_LABELS = 1_000  # above this number of labels, the adapter must have a head of that size
_MODULES = 1_000
TEMPLATE_CHARACTERS = 1_000_000  # limit for the chat template of an adapter; the longest known have 30,000


@dataclass(frozen=True)
class Quantization:
    """Quantization of a base: arguments of `peftcore.quantize`, with the name of the compute dtype."""

    quant_type: str
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: str | None = None
    skip: tuple[str, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `peftcore.quantize` and `peftcore.quantization.load`."""
        import torch

        dtype = None if self.compute_dtype is None else getattr(torch, self.compute_dtype)
        return {**vars(self), "compute_dtype": dtype}

    def __str__(self) -> str:
        dense = "" if self.skip is None else f", {len(self.skip)} weights dense"
        return f"{self.quant_type} (blocksize={self.blocksize}, double_quant={self.double_quant}{dense})"


@dataclass(frozen=True)
class AdapterTask:
    """Task of an adapter, stored with it as `peftcore_task.json`, which PEFT ignores."""

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    chat: bool | None = None  # whether it was trained on conversations; None if unknown
    chat_template: str | None = None  # chat template, if it differs from the tokenizer's
    beta: float | None = None  # beta of preference tasks, if not the default
    weights: tuple[float, float] | None = None  # weights of good and bad answers, if not 1
    dtype: str | None = None  # of the base in training
    seed: int | None = None  # seed of a classifier's new head
    language: str | None = None  # of recordings
    pooling: str | None = None  # pooling of hidden states into a text embedding
    quantized: Quantization | None = (
        None  # quantization of the base in training; None if its weights were loaded unchanged
    )

    def write(self, folder: Path) -> None:
        """Write the file into the adapter's folder, replacing a link."""
        if (folder / TASK_FILE).is_symlink():
            (folder / TASK_FILE).unlink()
        (folder / TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def adapter_task(folder: Path, labels: str | None = None) -> AdapterTask:
    """Return the task of the adapter in `folder`, from its task file or, without one, from the adapter itself.

    Args:
        folder: folder of the adapter.
        labels: labels of a classifier in the order of its outputs, separated by commas. If given, an adapter in another
            library's format is treated as a classifier.

    Raises:
        PeftcoreError: the folder has no adapter, or its task is not supported by any command.
    """
    import peftcore

    refuse_other_folders(folder)
    names = tuple(part.strip() for part in labels.split(",")) if labels else ()
    info, file = peftcore.inspect(folder), folder / TASK_FILE
    try:
        task = _parse_task(safe_reading.parse_json(safe_reading.read_bytes(file, safe_reading.JSON_BYTES), file))
        _refuse_labels_without_outputs(info, task)
    except FileNotFoundError:
        if info.format != "peft":  # other formats record no task and have no heads
            return AdapterTask(registered.default_name(names), 512, names)
        task = _task_of_peft(info)
    except KeyError as error:
        raise CheckpointError(
            f"cannot read '{file}': the field {error} is missing. Delete the file to use the adapter without it"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot read '{file}': {error}. Delete the file to use the adapter without it"
        ) from error
    if names and len(names) != len(task.labels):
        raise PeftcoreError(
            f"--labels names {len(names)} labels, but the adapter has {len(task.labels)}. Name one label per output"
        )
    return replace(task, labels=names or task.labels)


def _parse_task(record: Any) -> AdapterTask:
    """Return the content of a task file, which is untrusted.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has another type.
        ValueError: a field has an invalid value.
    """
    if not isinstance(record, dict):
        raise TypeError(f"the file must contain a JSON object, found {validation.shown(record)}")
    optional = {name: record.get(name) for name in ("beta", "dtype", "seed", "pooling", "language")}
    task = AdapterTask(
        record["task"],
        record["max_length"],
        tuple(record["labels"]),
        chat=record.get("chat", False),  # old files do not have this field
        chat_template=record.get("chat_template"),
        quantized=_quantization(record.get("quantized")),
        weights=None if record.get("weights") is None else tuple(record["weights"]),
        **optional,
    )
    if type(record["labels"]) is not list:
        raise TypeError(f"labels must be a list, found {validation.shown(record['labels'])}")
    task_names = [candidate.name for candidate in registered.tasks()]
    if task.task not in task_names:
        raise ValueError(f"task must be one of {', '.join(task_names)}, found {validation.shown(task.task)}")
    validation.check_types(task)
    _check_template(task.chat_template)
    return task


def _check_template(template: str | None) -> None:
    if template is None:
        return
    # With a path, an untrusted adapter could read files of the user.
    if "{" not in template and template != "chatml":
        raise ValueError(
            f"chat_template={validation.shown(template)} must be a template or 'chatml' (pass --chat-template FILE "
            "to use a file)"
        )
    if len(template) > TEMPLATE_CHARACTERS:
        raise ValueError(f"chat_template has {len(template):,} characters, but the limit is {TEMPLATE_CHARACTERS:,}")


def _quantization(stored: Any) -> Quantization | None:
    """Return the record of a quantized base, which is untrusted.

    Raises:
        ValueError: a field has an invalid value.
        TypeError: a field is missing or unknown, or has another type.
    """
    if stored is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.get("skip") or ()):
        raise TypeError(
            f"quantized must be a JSON object with a list of names to skip, found {validation.shown(stored)}"
        )
    skip = stored.get("skip")
    record = Quantization(**{**stored, "skip": None if skip is None else tuple(skip)})
    validation.check_types(record)
    if record.compute_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(
            f"compute_dtype must be float32, bfloat16 or float16, found {validation.shown(record.compute_dtype)}"
        )
    return record


def _refuse_labels_without_outputs(info: AdapterInfo, task: AdapterTask) -> None:
    """Raise a ValueError for a very large number of labels without a head of that size, before a head is allocated."""
    count = len(task.labels)
    has_head = any(tensor.shape[:1] == (count,) for tensor in info.tensors)
    if count > _LABELS and not has_head and registered.find(task.task).has_labels:
        raise ValueError(f"the file has {count:,} labels, but no tensor of the adapter has {count:,} rows")


def refuse_without_prompts(name: str, task: str) -> None:
    """Raise a PeftcoreError that names the command to use for an adapter whose task does not answer prompts."""
    adapter_task = registered.find(task)
    if not adapter_task.answers_texts:
        raise PeftcoreError(f"'{name}' {adapter_task.no_chat}")


def base_of(folder: Path, model: str | None) -> str:
    """Return `model`, or by default the base that the adapter records."""
    import peftcore

    base = model or peftcore.inspect(folder).base
    if not base:
        raise PeftcoreError(f"the adapter in '{folder}' does not record its base. Pass the base: --model MODEL")
    return base


def adapter_folder(folder: Path) -> Path:
    """Return the adapter's folder; `folder` may be the folder of a run."""
    adapter_of_run = folder / "adapter"
    if os.path.exists(folder / "adapter_config.json") or not os.path.exists(adapter_of_run / "adapter_config.json"):
        return folder
    return adapter_of_run


def refuse_other_folders(folder: Path) -> None:
    """Raise a PeftcoreError for an unfinished run or an empty folder."""
    if not os.path.isdir(folder) or os.path.exists(folder / "adapter_config.json"):
        return  # other files may be an adapter in another library's format, whose reader reports what is missing
    checkpoints = sorted(
        (folder / "checkpoints").glob("checkpoint-*"), key=lambda checkpoint: (len(checkpoint.name), checkpoint.name)
    )
    if os.path.exists(folder / "run.json"):
        checkpoint_hint = f", or pass its newest checkpoint: {checkpoints[-1]}" if checkpoints else ""
        raise PeftcoreError(
            f"the run in '{folder}' has not finished, so it has no adapter yet. Continue the run with "
            f"--resume{checkpoint_hint}"
        )
    if not os.listdir(folder):
        raise PeftcoreError(
            f"the folder '{folder}' is empty. Pass the folder of a run (--output of peftcore train) or of a saved "
            "adapter"
        )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer was saved with the adapter. Its vocabulary may be larger than the base's."""
    return os.path.exists(folder / "tokenizer_config.json")


def _task_of_peft(info: AdapterInfo) -> AdapterTask:
    record = next(filter(None, (task.from_peft(info) for task in registered.tasks())), None)
    if record is None:
        raise PeftcoreError(
            f"the adapter in '{info.path}' is for the task {info.task_type}, which no command supports. Load it in "
            "Python: peftcore.load"
        )
    return record


def outputs_of_peft(info: AdapterInfo) -> int:
    """Return the number of outputs of the classification head in a PEFT adapter folder.

    Raises:
        CheckpointError: it has no head.
    """
    module_names = info.fields.get("modules_to_save") or ["classifier", "score"]
    if (
        not isinstance(module_names, list)
        or len(module_names) > _MODULES
        or not all(isinstance(name, str) for name in module_names)
    ):
        raise CheckpointError(
            f"modules_to_save in '{info.path}' must be a list of names, found {validation.shown(module_names)}"
        )
    heads = []
    for name, tensor in info.parts[""].items():
        is_head = any(f".{module}." in name for module in module_names)
        if is_head and tensor.dim():
            heads.append(tensor)
    if not heads:
        raise CheckpointError(
            f"the adapter in '{info.path}' has no classification head. Remove --labels if it is not a classifier"
        )
    return int(heads[-1].shape[0])
