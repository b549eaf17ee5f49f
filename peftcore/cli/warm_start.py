"""`train --adapter`: what an adapter that is there says of the run that goes on with it, and what contradicts that.

The base, the method and the task are the adapter's own. A run on a base that its method has prepared (in 4 bits) has
written so beside its adapter, whose file does not tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.adapter_files.content import JSON_BYTES, parse_json, read_bytes
from peftcore.cli import data, models
from peftcore.cli.fields import text_of
from peftcore.cli.models import TASK_FILE, AdapterTask
from peftcore.cli.settings import RUN_FILE, Settings
from peftcore.errors import PeftcoreError
from peftcore.validation import check_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRITERS = (data.LANGUAGE_MODEL, data.PREFERENCES)  # a model that learned one may go on with the other
_ADAPTER = "default"


@dataclass(frozen=True)
class Start:
    """An adapter to go on from. `fields` are those of a method that has prepared its base."""

    folder: Path
    task: AdapterTask
    base: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)

    def task_of(self, task: str | None, files: Sequence[str], columns: Mapping[str, str] | None) -> str:
        """The task of the run: the one that is named, else the adapter's, or of a language model what the file is for.

        Raises:
            PeftcoreError: the adapter is for another.
        """
        own = self.task.task
        if own in _WRITERS:
            found = task or data.guess_task(files, columns)
            fits = found in _WRITERS
        else:
            found = task or own
            fits = found == own or (found == data.MULTI_LABEL and not self._says_task() and bool(self.task.labels))
        data.check_task(found)
        if not fits:
            what = f"--task {found} is another" if task else f"{', '.join(map(repr, files))} is for {found}"
            raise PeftcoreError(
                f"the adapter in '{self.folder}' is for {own}, and {what}. Begin a new adapter: leave out --adapter"
            )
        return found

    def _says_task(self) -> bool:
        return (self.folder / TASK_FILE).exists()


def start_of(folder: Path, output: Path, *, model: str | None, method: str | None, labels: str | None) -> Start:
    """What the adapter in `folder` says of a run that goes on with it, into the folder `output`.

    Raises:
        PeftcoreError: there is none, `method` does not read it, or it lies in `output`.
    """
    from peftcore import checkpoint
    from peftcore.registry import registry

    if folder.resolve().is_relative_to(output.resolve()):
        raise PeftcoreError(
            f"--adapter names the adapter of the run in '{output}' itself. To go on with that run where it was cut "
            "off: --resume, without --adapter. To train its adapter on new data: another folder, --output FOLDER"
        )
    task, base = models.adapter_task(folder, labels), models.base_of(folder, model)
    before = made_by(folder)
    if method is None and before is not None and before.method in registry.methods():
        method = before.method if registry.method(before.method).recorded_as is not None else None
    chosen = None if method is None else registry.method(method)
    if chosen is None or chosen.recorded_as is None:
        return Start(folder.resolve(), task, base, checkpoint.method_of(folder, method, "--method {}").name)
    fields = before.fields if before is not None and before.method == chosen.name else {}
    return Start(folder.resolve(), task, base, chosen.name, fields)


def labels_of(folder: Path, labels: str | None) -> tuple[str, ...]:
    """The names of a classifier's outputs, which stay what they are; `labels` are those that the user gives."""
    return models.adapter_task(folder, labels).labels


def made_by(folder: Path) -> Settings | None:
    """Return the settings of the run that made the adapter in `folder`, if it is in one that can be read.

    The run may be a stranger's.
    """
    where = folder.resolve()
    if where.name != "adapter":
        return None
    file = where.parent / RUN_FILE
    try:
        found = Settings(**parse_json(read_bytes(file, JSON_BYTES), file))
        check_types(found)
        return found
    except (FileNotFoundError, PeftcoreError, TypeError):
        return None


def load(model: PreTrainedModel, settings: Settings) -> None:
    """Put the adapter of `settings` on its base, trainable.

    Raises:
        PeftcoreError: it is not of this base, or a field that is given is not as the adapter has it.
    """
    import torch

    import peftcore
    from peftcore import checkpoint, engine
    from peftcore.registry import registry

    folder, method = Path(str(settings.adapter)), registry.method(settings.method)
    named = None if method.recorded_as is not None else method.name
    models.fit_vocabulary(model, folder)
    _, config, _, _ = checkpoint.read(folder, model, named)
    shared = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    names = {each.name for each in dataclasses.fields(method.config_class)}
    asked: Any = None
    if settings.fields or method.prepare is not None:
        wanted = {**{name: value for name, value in shared.items() if name in names}, **settings.fields}
        with torch.device("meta"):  # what it would place is not needed
            asked = engine.placements_for(model, method.name, wanted).config
    if method.prepare is not None:
        method.prepare(model, asked)
    peftcore.load(model, folder, method=named)
    applied = [each.name for each in peftcore.summary(model).adapters]
    if applied != [_ADAPTER]:
        raise PeftcoreError(f"'{folder}' holds the adapters {', '.join(applied)}. Name the folder of one of them")
    _refuse_other_fields(folder, settings, engine.applied(model, _ADAPTER).config, asked)


def _refuse_other_fields(folder: Path, settings: Settings, config: Any, asked: Any) -> None:
    """`config` is what the adapter has, `asked` what the fields that are given mean on this model."""
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
                f"{name}={text_of(_plain(there))}. Leave it out, or begin a new adapter without --adapter"
            )


def _default(config: Any, name: str) -> Any:
    return next(each.default for each in dataclasses.fields(config) if each.name == name)


def _plain(value: Any) -> Any:
    """A value as JSON has it; of names the order does not count."""
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(each) for each in value]
        return sorted(items) if all(isinstance(each, str) for each in items) else items
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value
