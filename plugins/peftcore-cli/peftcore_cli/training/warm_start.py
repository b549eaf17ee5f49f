"""`train --adapter`: start a run from an existing adapter, and refuse options that contradict it.

The base, in 4 bits if it was in 4 bits, the method and the task are the adapter's. A run by a method that prepares its
base records the method in its settings, because the adapter's file does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.errors import PeftcoreError
from peftcore.plugin import safe_reading, validation
from peftcore_cli.bases import adapter_folders, base_and_adapter
from peftcore_cli.bases.adapter_folders import TASK_FILE, AdapterTask
from peftcore_cli.fields import text_of
from peftcore_cli.settings import RUN_FILE, RunOptions, Settings
from peftcore_cli.tasks import registered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Start:
    """An adapter to start from.

    `fields` are config fields of a method that prepares its base; `quantize` is the 4-bit type of the base in training.
    """

    folder: Path
    task: AdapterTask
    base: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def task_of(self, task: str | None) -> str | None:
        """Return the run's task: the given one, otherwise the adapter's; None if the data decide among related ones.

        Raises:
            PeftcoreError: the adapter is for another task.
        """
        if task is not None:
            self.check_task(task, f"--task {task} is different")
            return task
        return None if registered.find(self.task.task).family is not None else self.task.task

    def completed(self, given: RunOptions) -> RunOptions:
        """Return the options of a run with what the adapter records: the language of its recordings."""
        return replace(given, language=given.language or self.task.language)

    def check_task(self, task: str, what: str) -> None:
        """Raise a PeftcoreError, with `what` has another task, unless the adapter can be trained further for `task`."""
        own = self.task.task
        is_recorded = (self.folder / TASK_FILE).exists()
        before = registered.find(own)
        if not registered.find(task).continues(before, is_recorded=is_recorded, labels=self.task.labels):
            raise PeftcoreError(
                f"the adapter in '{self.folder}' is for {own}, and {what}. To train a new adapter, leave out --adapter"
            )


def start_of(folder: Path, output: Path, *, model: str | None, method: str | None, labels: str | None) -> Start:
    """Return what the adapter in `folder` determines about a run that starts from it and writes to `output`.

    Raises:
        PeftcoreError: there is no adapter, `method` does not read it, or it is in `output`.
    """
    import peftcore

    if folder.resolve().is_relative_to(output.resolve()):
        raise PeftcoreError(
            f"--adapter is the adapter of the run in '{output}' itself. To resume that run use --resume without "
            "--adapter; to train its adapter on new data use another folder: --output FOLDER"
        )
    task, base = adapter_folders.adapter_task(folder, labels), adapter_folders.base_of(folder, model)
    before = made_by(folder)
    if method is None and before is not None and before.method in peftcore.methods():
        method = before.method if peftcore.method(before.method).recorded_as is not None else None
    chosen = None if method is None else peftcore.method(method)
    if chosen is None or chosen.recorded_as is None:
        info = peftcore.inspect(folder, method=method)
        if info.problem is not None:
            raise info.problem
        quantize = None if before is None else before.quantize
        if task.quantized is not None:
            quantize = task.quantized.quant_type
        return Start(folder.resolve(), task, base, str(info.method), quantize=quantize)
    fields = before.fields if before is not None and before.method == chosen.name else {}
    return Start(folder.resolve(), task, base, chosen.name, fields)


def labels_of(folder: Path, labels: str | None) -> tuple[str, ...]:
    """Return the names of a classifier's outputs, which do not change; `labels` are those given by the user."""
    return adapter_folders.adapter_task(folder, labels).labels


def made_by(folder: Path) -> Settings | None:
    """Return the settings of the run that made the adapter in `folder`, or None if they cannot be read.

    The settings are untrusted.
    """
    where = folder.resolve()
    if where.name != "adapter":
        return None
    file = where.parent / RUN_FILE
    try:
        found = Settings(**safe_reading.parse_json(safe_reading.read_bytes(file, safe_reading.JSON_BYTES), file))
        validation.check_types(found)
        return found
    except (FileNotFoundError, PeftcoreError, TypeError):
        return None


def load(model: PreTrainedModel, settings: Settings) -> None:
    """Load the adapter of `settings` on its base, trainable.

    Raises:
        PeftcoreError: it belongs to another base, or a given field differs from the adapter's.
    """
    import peftcore
    from peftcore.files import config_of_folder

    folder, method = Path(str(settings.adapter)), peftcore.method(settings.method)
    named = None if method.recorded_as is not None else method.name
    base_and_adapter.fit_vocabulary(model, folder)
    config = config_of_folder(folder, model, named)
    shared = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    names = {each.name for each in dataclasses.fields(method.config_class)}
    asked: Any = None
    if settings.fields or method.prepare is not None:
        wanted = {**{name: value for name, value in shared.items() if name in names}, **settings.fields}
        asked = peftcore.plan(model, method.name, **wanted).config
    if method.prepare is not None:
        method.prepare(model, asked)
    peftcore.load(model, folder, method=named, trainable=True)
    adapters = peftcore.summary(model).adapters
    adapter_names = [adapter.name for adapter in adapters]
    if adapter_names != ["default"]:
        shown = ", ".join(adapter_names)
        raise PeftcoreError(f"'{folder}' contains the adapters {shown}. Pass the folder of one of them")
    _refuse_other_fields(folder, settings, adapters[0].config, asked)


def _refuse_other_fields(folder: Path, settings: Settings, config: Any, asked: Any) -> None:
    """Raise a PeftcoreError if given fields, as `asked` on this model, differ from the adapter's `config`."""
    before = made_by(folder)
    known = before.fields if before is not None and before.method == settings.method else {}
    for name, value in settings.fields.items():
        if name in known and _plain(known[name]) == _plain(value):
            continue
        if hasattr(config, name):
            there = getattr(config, name)
        elif before is None or before.method != settings.method:
            continue  # how the base was prepared is not known
        else:
            there = known.get(name, _default(asked, name))
        if _plain(there) not in (_plain(value), _plain(getattr(asked, name))):
            raise PeftcoreError(
                f"--set {name}={text_of(value)} contradicts the adapter in '{folder}', which has "
                f"{name}={text_of(_plain(there))}. Leave it out, or train a new adapter without --adapter"
            )


def _default(config: Any, name: str) -> Any:
    return next(each.default for each in dataclasses.fields(config) if each.name == name)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, with names in sorted order."""
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(each) for each in value]
        return sorted(items) if all(isinstance(each, str) for each in items) else items
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value
