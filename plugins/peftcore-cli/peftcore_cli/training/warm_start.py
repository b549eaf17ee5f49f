"""`train --adapter`: start a run from an existing adapter, and refuse options that contradict it.

The adapter determines the base and its quantization, the method and the task. For methods that prepare the base, the
method's name comes from the run's settings, because the adapter's files do not record it.
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
    """An adapter to continue from.

    `fields`: config fields of a method that prepares its base. `quantize`: 4-bit type of the base in training.
    """

    folder: Path
    task: AdapterTask
    base: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    def task_of(self, task: str | None) -> str | None:
        """Return the run's task: `task` if it is given, otherwise the adapter's; None to infer it from the data.

        Raises:
            PeftcoreError: the adapter was trained for another task.
        """
        if task is not None:
            self.check_task(task, f"--task is {task}")
            return task
        return None if registered.find(self.task.task).family is not None else self.task.task

    def completed(self, run_options: RunOptions) -> RunOptions:
        """Return the run's options with the language that the adapter records, if the user passed none."""
        return replace(run_options, language=run_options.language or self.task.language)

    def check_task(self, task: str, problem: str) -> None:
        """Raise a PeftcoreError that quotes `problem` unless training for `task` can continue from the adapter."""
        adapter_task = registered.find(self.task.task)
        is_recorded = (self.folder / TASK_FILE).exists()
        if not registered.find(task).continues(adapter_task, is_recorded=is_recorded, labels=self.task.labels):
            raise PeftcoreError(
                f"the adapter in '{self.folder}' was trained for {adapter_task.name}, but {problem}. To train a new "
                "adapter, remove --adapter"
            )


def start_of(folder: Path, output: Path, *, model: str | None, method: str | None, labels: str | None) -> Start:
    """Return the start of a run that continues from the adapter in `folder` and writes to `output`.

    Raises:
        PeftcoreError: `folder` has no adapter, `method` cannot read it, or it is inside `output`.
    """
    import peftcore

    if folder.resolve().is_relative_to(output.resolve()):
        raise PeftcoreError(
            f"--adapter and --output name the same run, '{output}'. To resume the run, replace --adapter with "
            "--resume. To train its adapter on new data, pass another folder: --output FOLDER"
        )
    task, base = adapter_folders.adapter_task(folder, labels), adapter_folders.base_of(folder, model)
    previous = settings_of_adapter(folder)
    if method is None and previous is not None and previous.method in peftcore.methods():
        method = previous.method if peftcore.method(previous.method).recorded_as is not None else None
    chosen_method = None if method is None else peftcore.method(method)
    if chosen_method is None or chosen_method.recorded_as is None:
        info = peftcore.inspect(folder, method=method)
        if info.problem is not None:
            raise info.problem
        quantize = None if previous is None else previous.quantize
        if task.quantized is not None:
            quantize = task.quantized.quant_type
        return Start(folder.resolve(), task, base, str(info.method), quantize=quantize)
    fields = previous.fields if previous is not None and previous.method == chosen_method.name else {}
    return Start(folder.resolve(), task, base, chosen_method.name, fields)


def labels_of(folder: Path, labels: str | None) -> tuple[str, ...]:
    """Return the classifier's labels, which training does not change. `labels` is the value of --labels."""
    return adapter_folders.adapter_task(folder, labels).labels


def settings_of_adapter(folder: Path) -> Settings | None:
    """Return the settings of the run that trained the adapter in `folder`, or None if they cannot be read.

    The file is untrusted.
    """
    resolved = folder.resolve()
    if resolved.name != "adapter":
        return None
    file = resolved.parent / RUN_FILE
    try:
        settings = Settings(**safe_reading.parse_json(safe_reading.read_bytes(file, safe_reading.JSON_BYTES), file))
        validation.check_types(settings)
        return settings
    except (FileNotFoundError, PeftcoreError, TypeError):
        return None


def load(model: PreTrainedModel, settings: Settings) -> None:
    """Load the adapter of `settings` on its base for further training.

    Raises:
        PeftcoreError: the adapter belongs to another base, or a field of --set differs from the adapter's.
    """
    import peftcore
    from peftcore.files import config_of_folder

    folder, method = Path(str(settings.adapter)), peftcore.method(settings.method)
    reader = None if method.recorded_as is not None else method.name
    base_and_adapter.fit_vocabulary(model, folder)
    config = config_of_folder(folder, model, reader)
    adapter_fields = {
        config_field.name: getattr(config, config_field.name) for config_field in dataclasses.fields(config)
    }
    names = {config_field.name for config_field in dataclasses.fields(method.config_class)}
    requested: Any = None
    if settings.fields or method.prepare is not None:
        fields_of_method = {
            **{name: value for name, value in adapter_fields.items() if name in names},
            **settings.fields,
        }
        requested = peftcore.plan(model, method.name, **fields_of_method).config
    if method.prepare is not None:
        method.prepare(model, requested)
    peftcore.load(model, folder, method=reader, trainable=True)
    adapters = peftcore.summary(model).adapters
    adapter_names = [adapter.name for adapter in adapters]
    if adapter_names != ["default"]:
        shown = ", ".join(adapter_names)
        raise PeftcoreError(f"'{folder}' contains several adapters: {shown}. Pass the folder of a single adapter")
    _refuse_other_fields(folder, settings, adapters[0].config, requested)


def _refuse_other_fields(folder: Path, settings: Settings, config: Any, requested: Any) -> None:
    """Raise a PeftcoreError if fields of --set (part of the config `requested`) differ from the adapter's `config`."""
    previous = settings_of_adapter(folder)
    recorded = previous.fields if previous is not None and previous.method == settings.method else {}
    for name, value in settings.fields.items():
        if name in recorded and _plain(recorded[name]) == _plain(value):
            continue
        if hasattr(config, name):
            adapter_value = getattr(config, name)
        elif previous is None or previous.method != settings.method:
            continue  # the fields that the base was prepared with are unknown
        else:
            adapter_value = recorded.get(name, _default(requested, name))
        if _plain(adapter_value) not in (_plain(value), _plain(getattr(requested, name))):
            raise PeftcoreError(
                f"--set {name}={text_of(value)} contradicts the adapter in '{folder}', which has "
                f"{name}={text_of(_plain(adapter_value))}. Remove --set {name}, or train a new adapter without "
                "--adapter"
            )


def _default(config: Any, name: str) -> Any:
    return next(config_field.default for config_field in dataclasses.fields(config) if config_field.name == name)


def _plain(value: Any) -> Any:
    """Return a value as JSON represents it, with lists of names sorted."""
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
