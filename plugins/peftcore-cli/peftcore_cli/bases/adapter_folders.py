"""Adapter folders as commands name them: what the adapter was trained for, and on which base."""

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
_LABELS = 1_000  # above this, the adapter's head is checked before the base gets one
_MODULES = 1_000
TEMPLATE_CHARACTERS = 1_000_000  # of a chat template that came with an adapter; the longest known have 30,000


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized: arguments of `peftcore.quantize`, with the compute dtype by its name."""

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
        skipped = "" if self.skip is None else f", {len(self.skip)} weights dense"
        return f"{self.quant_type} (blocksize={self.blocksize}, double_quant={self.double_quant}{skipped})"


@dataclass(frozen=True)
class AdapterTask:
    """What an adapter was trained for, stored with it as `peftcore_task.json`, which PEFT ignores."""

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    chat: bool | None = None  # whether it was trained on conversations; None if unknown
    chat_template: str | None = None  # if it is not the tokenizer's own
    beta: float | None = None  # of preferences, if it is not the default
    weights: tuple[float, float] | None = None  # of good and bad answers, if they are not 1
    dtype: str | None = None  # of the base in training
    seed: int | None = None  # seed of a classifier's new head
    language: str | None = None  # of recordings
    pooling: str | None = None  # of token vectors into that of a text
    quantized: Quantization | None = None  # the base in training; None if its weights were read as they are

    def write(self, folder: Path) -> None:
        """Write the file into the adapter's folder, replacing a link."""
        if (folder / TASK_FILE).is_symlink():
            (folder / TASK_FILE).unlink()
        (folder / TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def adapter_task(folder: Path, labels: str | None = None) -> AdapterTask:
    """Return the task of the adapter in `folder`; without our task file (written by PEFT), determined from the adapter.

    Args:
        folder: folder of the adapter.
        labels: a classifier's labels in the order of its outputs, separated by commas. An adapter in another library's
            format is taken to be a classifier's if they are given.

    Raises:
        PeftcoreError: the folder has no adapter, or one for a task that no command runs.
    """
    import peftcore

    refuse_other_folders(folder)
    given = tuple(part.strip() for part in labels.split(",")) if labels else ()
    info = peftcore.inspect(folder)
    try:
        stored = safe_reading.parse_json(
            safe_reading.read_bytes(folder / TASK_FILE, safe_reading.JSON_BYTES), folder / TASK_FILE
        )
        if not isinstance(stored, dict):
            raise TypeError(f"it must be a JSON object, found {validation.shown(stored)}")
        # Files without `chat` are older than conversations.
        chat, template = stored.get("chat", False), stored.get("chat_template")
        more = {name: stored.get(name) for name in ("beta", "dtype", "seed", "pooling", "language")}
        more["quantized"] = _quantization(stored.get("quantized"))
        more["weights"] = None if stored.get("weights") is None else tuple(stored["weights"])
        task = AdapterTask(stored["task"], stored["max_length"], tuple(stored["labels"]), chat, template, **more)
        if type(stored["labels"]) is not list:
            raise TypeError(f"labels must be a list, found {validation.shown(stored['labels'])}")
        known = [each.name for each in registered.tasks()]
        if task.task not in known:
            raise ValueError(f"task must be one of {', '.join(known)}, found {validation.shown(task.task)}")
        validation.check_types(task)
        if template is not None and "{" not in template and template != "chatml":
            raise ValueError(
                f"chat_template={validation.shown(template)} is neither a template nor 'chatml', and is not opened as "
                "a path (to use a file, pass --chat-template FILE)"
            )
        if template is not None and len(template) > TEMPLATE_CHARACTERS:
            raise ValueError(
                f"chat_template has {len(template):,} characters; at most {TEMPLATE_CHARACTERS:,} are read"
            )
        _refuse_labels_without_outputs(info, task)
    except FileNotFoundError:
        if info.format != "peft":  # not stated; heads are elsewhere and belong to the base
            return AdapterTask(registered.default_name(given), 512, given)
        task = _task_of_peft(info)
    except KeyError as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: it lacks {error}. It can be deleted") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: {error}. It can be deleted") from error
    if given and len(given) != len(task.labels):
        raise PeftcoreError(f"--labels names {len(given)} labels, but the adapter has {len(task.labels)}")
    return replace(task, labels=given or task.labels)


def _quantization(stored: Any) -> Quantization | None:
    """Return the record of a base in 4 bits.

    Raises:
        ValueError: the record is damaged.
        TypeError: a field is missing or unknown, or has another type.
    """
    if stored is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.get("skip") or ()):
        raise TypeError(f"quantized must be a JSON object with names to skip, found {validation.shown(stored)}")
    skip = stored.get("skip")
    found = Quantization(**{**stored, "skip": None if skip is None else tuple(skip)})
    validation.check_types(found)
    if found.compute_dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(
            f"compute_dtype must be float32, bfloat16 or float16, found {validation.shown(found.compute_dtype)}"
        )
    return found


def _refuse_labels_without_outputs(info: AdapterInfo, task: AdapterTask) -> None:
    """Raise a ValueError for very many labels without a head in the adapter, before the base gets one of that size."""
    count = len(task.labels)
    has_head = any(tensor.shape[:1] == (count,) for tensor in info.tensors)
    if count > _LABELS and not has_head and registered.find(task.task).has_labels:
        raise ValueError(f"it names {count:,} labels, but no tensor of the adapter has as many rows")


def refuse_without_prompts(name: str, task: str) -> None:
    """Raise a PeftcoreError with the command to use if the adapter `name` is for a task that answers no texts."""
    found = registered.find(task)
    if not found.answers_texts:
        raise PeftcoreError(f"'{name}' {found.no_chat}")


def base_of(folder: Path, model: str | None) -> str:
    """Return the base of an adapter: `model` if given, otherwise the one the adapter names."""
    import peftcore

    named = model or peftcore.inspect(folder).base
    if not named:
        raise PeftcoreError(f"'{folder}' does not name the base it was trained on. Pass it: --model MODEL")
    return named


def adapter_folder(folder: Path) -> Path:
    """Return the adapter's folder; `folder` may be that of the run that made it."""
    inside = folder / "adapter"
    here, there = (os.path.exists(each / "adapter_config.json") for each in (folder, inside))
    return inside if there and not here else folder


def refuse_other_folders(folder: Path) -> None:
    """Raise a PeftcoreError for a run without an adapter and for an empty folder, with what to do instead."""
    if not os.path.isdir(folder) or os.path.exists(folder / "adapter_config.json"):
        return  # other files may be an adapter of another library, whose reader says what is missing
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda each: (len(each.name), each.name))
    if os.path.exists(folder / "run.json"):
        more = f", or use its newest checkpoint: {checkpoints[-1]}" if checkpoints else ""
        raise PeftcoreError(
            f"the run in '{folder}' has no adapter yet, because it has not ended. Continue it with --resume{more}"
        )
    if not os.listdir(folder):
        raise PeftcoreError(
            f"'{folder}' is empty. Pass the folder of a run (--output of peftcore train) or one that `save` wrote"
        )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer is saved with the adapter, as trainers do; it may have more tokens than the base's."""
    return os.path.exists(folder / "tokenizer_config.json")


def _task_of_peft(info: AdapterInfo) -> AdapterTask:
    found = next(filter(None, (task.from_peft(info) for task in registered.tasks())), None)
    if found is None:
        raise PeftcoreError(
            f"'{info.path}' is for the task {info.task_type}, which no command supports. Use the library"
        )
    return found


def outputs_of_peft(info: AdapterInfo) -> int:
    """Return the number of outputs of the classifier's head in a folder that PEFT wrote.

    Raises:
        CheckpointError: it has no head.
    """
    saved = info.fields.get("modules_to_save") or ["classifier", "score"]
    if not isinstance(saved, list) or len(saved) > _MODULES or not all(isinstance(each, str) for each in saved):
        raise CheckpointError(
            f"'{info.path}': modules_to_save must be a list of names, found {validation.shown(saved)}"
        )
    held = [tensor for name, tensor in info.parts[""].items() if any(f".{module}." in name for module in saved)]
    heads = [tensor for tensor in held if tensor.dim()]
    if not heads:
        raise CheckpointError(f"'{info.path}' has no classification head among its tensors")
    return int(heads[-1].shape[0])
