"""What the folder of an adapter holds, or of several that were saved together; PEFT's, ours or another library's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore import adapter_files, engine
from peftcore.adapter_files import CONFIG, TENSORS, Folder
from peftcore.adapter_files.content import JSON_BYTES, parse_json
from peftcore.checkpoint.config import config_of_fields
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.method import ForeignFormat, Method
from peftcore.registry import registry

TOGETHER = "peftcore_together"  # in a file's metadata: which adapters were saved with it
TIED = "peftcore_tied"  # likewise: is what is tied in the base trained tied?


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in the folder of several, as in PEFT: `default` in it, others in folders of their name."""
    return folder / name_inside(adapter)


def name_inside(adapter: str) -> str:
    """The name of an adapter's folder in that of several; empty: it is that folder itself."""
    return "" if adapter == "default" else adapter


def read(folder: Path, model: nn.Module) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    """(method, config, tensors by today's names, metadata) of an adapter folder."""
    return adapter_files.read(folder, lambda opened: _read(opened, model))


def read_saved(
    opened: Folder, model: nn.Module, adapter: str | None
) -> tuple[dict[str, list[str]] | None, dict[str, Any]]:
    """({adapters, active} of those that were saved together, or None; what each adapter's files hold)."""
    together = _saved_together(opened) if adapter is None else None
    if together is None:
        return None, {adapter or "default": _read(opened, model)}
    return together, {name: _read(_of_several(opened, name), model) for name in together["adapters"]}


def _saved_together(opened: Folder) -> dict[str, list[str]] | None:
    """{adapters, active} of the adapters that were saved to a folder in one call, or None."""
    inside = [opened] if opened.holds(TENSORS) else map(opened.inside, opened.folders())
    text = next((text for each in inside if (text := each.metadata().get(TOGETHER))), None)
    if text is None:
        return None
    folder = opened.path
    try:
        together = json.loads(text)
        names, active = together["adapters"], together["active"]
        if not isinstance(names, list) or not isinstance(active, list):
            raise TypeError(f"adapters={names!r}, active={active!r}")
        if not names:
            raise ValueError("it names none")
        for name in (*names, *active):
            engine.check_name(name)  # it becomes a part of a path
        if not set(active) <= set(names) or len({*names}) < len(names) or len({*active}) < len(active):
            raise ValueError(f"it lets {active} act, but holds {names}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"'{folder}' does not say which adapters it holds ({TOGETHER}): {error}") from error
    return together if all(_of_several(opened, name).holds(TENSORS) for name in names) else None


def _of_several(opened: Folder, adapter: str) -> Folder:
    return opened.inside(name_inside(adapter)) if name_inside(adapter) else opened


def _read(opened: Folder, model: nn.Module) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    foreign = _foreign(opened)
    if foreign is not None:
        return _read_foreign(opened, model, *foreign)
    tensors, metadata = opened.tensors()
    # torch compares no numbers of 8 bits with others; float32 holds them all.
    tensors = {n: t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t for n, t in tensors.items()}
    fields = opened.config()
    method = registry.method_of_peft_type(fields["peft_type"])
    # PEFT's default is False, which its older files do not name.
    tied = metadata.get(TIED) != "false" if "peftcore_version" in metadata else fields.get("ensure_weight_tying")
    fields["ensure_weight_tying"] = False if tied is None else tied
    with guarded(method, opened.path):
        why = method.state.refused(tensors, fields)
        if why is not None:
            raise CheckpointError(f"'{opened.path}' cannot be read: {why}")
        config = method.state.config_on_disk(config_of_fields(opened.path, method, fields), tensors)
        return method, config, dict(method.state.read_tensors(tensors, config)), metadata


def ties_partly(metadata: dict[str, str]) -> bool:
    """Was the file written by a peftcore that wrote a tied parameter under one of its names?"""
    return "peftcore_version" in metadata and TIED not in metadata


def about(folder: Path) -> tuple[dict[str, Any], ForeignFormat | None]:
    """What an adapter folder says of itself: the fields of its config as PEFT names them, and its foreign format.

    Raises:
        CheckpointError: it holds no adapter.
    """
    return adapter_files.read(folder, _about)


def _about(opened: Folder) -> tuple[dict[str, Any], ForeignFormat | None]:
    foreign = _foreign(opened)
    if foreign is None:
        return opened.config(), None
    method, form, fields = foreign
    with guarded(method, opened.path):
        return {"peft_type": method.state.peft_type, **form.about(fields)}, form


def _foreign(opened: Folder) -> tuple[Method, ForeignFormat, dict[str, Any]] | None:
    """(method, format, fields) where the folder is another library's, by a config without peft_type."""
    try:
        fields = parse_json(opened.content(CONFIG, JSON_BYTES), opened.path / CONFIG)
    except (FileNotFoundError, CheckpointError):
        return None
    if not isinstance(fields, dict) or "peft_type" in fields:
        return None
    for method in registry.methods().values():
        for foreign in method.state.foreign:
            with guarded(method, opened.path):
                if foreign.matches(fields):
                    return method, foreign, fields
    return None


def _read_foreign(
    opened: Folder, model: nn.Module, method: Method, foreign: ForeignFormat, fields: dict[str, Any]
) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    tensors, _ = opened.tensors(foreign.tensors)
    try:
        with guarded(method, opened.path):
            config, tensors = foreign.read(model, fields, tensors)
    except PeftcoreError as error:
        raise CheckpointError(f"'{opened.path}', of {foreign.name}, cannot be read: {error}") from error
    return method, config, tensors, {}


@contextlib.contextmanager
def guarded(method: Method, folder: Path) -> Iterator[None]:
    """Within the block a plugin works on what a file holds: what it did not expect there is an error in the file."""
    try:
        yield
    except PeftcoreError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"'{folder}' holds something that the plugin '{method.name}' cannot use: {type(error).__name__}: {error}"
        ) from error
