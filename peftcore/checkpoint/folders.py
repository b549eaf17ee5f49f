"""Save and load adapters, in Hugging Face PEFT's format, and load strictly: what does not fit is an error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore import adapter_files, engine, ranks
from peftcore.adaptation.adapted import base_parameters
from peftcore.adapter_files import CONFIG, TENSORS, Content, Folder
from peftcore.adapter_files.content import JSON_BYTES, parse_json
from peftcore.checkpoint.config import config_from_disk, config_on_disk
from peftcore.checkpoint.fingerprint import difference, fingerprint
from peftcore.checkpoint.tensors import fill, is_tied_in, kept_on_disk, name_of_base, tensors_on_disk
from peftcore.engine.trained import base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.method import ForeignFormat, Method, Train
from peftcore.observation import detect
from peftcore.registry import registry
from peftcore.targets import drop_unmatched

_TOGETHER = "peftcore_together"
_TIED = "peftcore_tied"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    resumable: bool = True,
) -> Path:
    """Write an adapter to the folder `path`, or all of a model's adapters.

    In a distributed run rank 0 writes. Where the model is sharded every rank must call this, and returns when the
    files are there; else the other ranks return at once.

    Args:
        adapter: which one. Left out: all. Of several, `default` lies in the folder itself and the others in folders
            of their name, as in PEFT; `load` finds them together, in the order in which they act.
        dtype: of the floating tensors on disk; by default theirs.
        resumable: False leaves out what only further training needs (`StateRules.exported`).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written. What lay there is unharmed.
    """
    names = list(engine.require_state(model).applied) if adapter is None else [adapter]
    active = engine.state_of(model).active
    together = {} if len(names) == 1 else {_TOGETHER: json.dumps({"adapters": names, "active": active})}
    inside = {_inside(name) if together else "": name for name in names}
    return _save(model, Path(path), inside, dtype, resumable, together)


def save_each(model: nn.Module, path: str | os.PathLike[str], adapters: Sequence[str]) -> Path:
    """Write these adapters to their places in the folder `path`, all or none, for `restore`."""
    return _save(model, Path(path), {_inside(name): name for name in adapters}, None, True, {})


def place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in the folder of several, as in PEFT: `default` in it, others in folders of their name."""
    return folder / _inside(adapter)


def _inside(adapter: str) -> str:
    return "" if adapter == "default" else adapter


def _save(
    model: nn.Module,
    folder: Path,
    inside: dict[str, str],
    dtype: torch.dtype | None,
    resumable: bool,
    metadata: dict[str, str],
) -> Path:
    """Write adapters, by the place that each has inside of `folder`."""
    engine.refuse_merged(engine.require_state(model), "save")
    engine.refuse_changed(model)
    sharded = ranks.is_sharded(model)
    if inside and (sharded or ranks.rank() == 0):
        contents = {place: _content(model, name, dtype, resumable, metadata) for place, name in inside.items()}
        ranks.once(lambda: adapter_files.write(folder, contents), together=sharded)
    return folder


def _content(
    model: nn.Module, adapter: str, dtype: torch.dtype | None, resumable: bool, metadata: dict[str, str]
) -> Content:
    entry = engine.applied(model, adapter)
    method = registry.method(entry.method)
    ranks.gather_up(model)
    found = {**tensors_on_disk(model, adapter, own=resumable, exported=True), **kept_on_disk(model, adapter)}
    tensors = _for_disk(found, dtype)
    # What the adapter has a copy of may be anything in the base, such as a head that is drawn anew by every load.
    base = {
        name: tensor for name, tensor in base_tensors(model).items() if name_of_base(model, adapter, name) not in found
    }
    about = {"peftcore_version": peftcore.__version__, "peftcore_base": fingerprint(base, _important(model, base))}
    about[_TIED] = json.dumps(getattr(entry.config, "ensure_weight_tying", True))
    return Content(config_on_disk(model, method, adapter), tensors, {**about, **metadata})


def _important(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` that a load of the same base may draw anew: heads and the embedding."""
    architecture = detect(model)
    paths = [p for p in (architecture.embedding, architecture.output_head, *architecture.task_heads) if p]
    return {name for name in names if any(name.startswith(f"{path}.") for path in paths)}


def _for_disk(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Whole tensors on the CPU, each with a memory of its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = ranks.whole(tensor.detach())
        if dtype and tensor.is_floating_point():
            tensor = _cast(name, tensor, dtype)
        found[name] = tensor.cpu().contiguous()
    seen: set[int] = set()
    for name, tensor in found.items():
        if tensor.data_ptr() in seen:  # a tied parameter, under another of its names
            found[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return found


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another floating dtype, unless a value is too large for it."""
    found = tensor.to(dtype)
    if not bool((found.isfinite() | ~tensor.isfinite()).all()):
        raise CheckpointError(
            f"'{name}' holds {tensor.abs().max().item():.3g}, which is too large for {dtype}. Take another dtype"
        )
    return found


@engine.alone("load adapters", base=True)
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Apply the adapter that lies in the folder `path`, or those that were saved there together.

    The folder was written here, by Hugging Face PEFT, or in a foreign format that a plugin reads.

    Args:
        adapter: the name of the folder's own adapter on this model, `default` if left out. Adapters that were saved
            together are all loaded if it is left out, under the names they had.
        trainable: False freezes it.
        dtype: of its parameters, as for `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, where the file has one.

    Raises:
        CheckpointError: the files cannot be read, or do not fit the model. The model is then as it was.
    """
    folder = Path(path)
    together, contents = adapter_files.read(folder, lambda opened: _read_all(opened, model, adapter))
    before = engine.state_of(model)
    active = before.active if before else ()
    done: list[str] = []
    try:
        for name, content in contents.items():
            if together and engine.state_of(model):
                engine.activate(model, [])  # two that train one parameter may lie together
            _load(model, place(folder, name) if together else folder, content, name, dtype, check_base)
            done.append(name)
            engine.set_trainable(model, name, trainable)
        if together:
            engine.activate(model, [*active, *together["active"]])
    except BaseException:
        for name in done:
            engine.remove(model, name)
        if engine.state_of(model):
            engine.set_active(model, active)
        raise
    return model


def _read_all(
    opened: Folder, model: nn.Module, adapter: str | None
) -> tuple[dict[str, list[str]] | None, dict[str, Any]]:
    """({adapters, active} of those that were saved together, or None; what each adapter's files hold)."""
    together = _saved_together(opened) if adapter is None else None
    if together is None:
        return None, {adapter or "default": _read(opened, model)}
    return together, {name: _read(_of_several(opened, name), model) for name in together["adapters"]}


def _of_several(opened: Folder, adapter: str) -> Folder:
    return opened.inside(_inside(adapter)) if _inside(adapter) else opened


def _load(
    model: nn.Module, folder: Path, content: Any, adapter: str, dtype: torch.dtype | None, check_base: bool
) -> None:
    method, config, tensors, metadata = content
    if check_base and "peftcore_base" in metadata:
        found = difference(base_tensors(model), metadata["peftcore_base"])
        if found:
            raise CheckpointError(
                f"'{folder}' was trained on another base: {found}. If each load of the base draws that anew (a head, "
                "new rows of a vocabulary), have its module trained along: modules_to_save. "
                "To load it all the same: peftcore.load(..., check_base=False)"
            )
    changes = {
        name: drop_unmatched(model, value)
        for name in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(value := getattr(config, name, None), (list, tuple)) and value
    }
    if hasattr(config, "modules_to_save"):  # None: no other heads than those that the file holds
        named = changes.get("modules_to_save", config.modules_to_save) or []
        changes["modules_to_save"] = [*named, *_unnamed_heads(model, method, named, tensors)]
    saved = changes.get("modules_to_save")
    if saved and getattr(config, "ensure_weight_tying", False) and "peftcore_version" not in metadata:
        changes["ensure_weight_tying"] = is_tied_in(model, method, saved, tensors)  # PEFT ties by names, and not always
    config = dataclasses.replace(config, **changes)
    _check_fits(model, method, config, tensors, folder)
    engine.apply(model, config, adapter=adapter, dtype=dtype)
    try:
        fill(model, adapter, tensors, folder, partly_tied=_is_old(metadata))
    except BaseException:
        engine.remove(model, adapter)
        raise


def _check_fits(model: nn.Module, method: Method, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a CheckpointError unless the config can be applied, and asks for no more numbers than the file holds."""
    try:
        with torch.device("meta"), _of_plugin(method, folder):
            placed = engine.place(model, config, {})
    except (CheckpointError, PluginError):
        raise
    except PeftcoreError as error:
        raise CheckpointError(f"'{folder / CONFIG}' does not fit {type(model).__name__}: {error}") from error
    wanted = sum(tensor.numel() for each in placed.around for tensor in each.adapter.state_dict().values())
    there = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * there + 1_000_000:  # a small difference is named tensor by tensor
        raise CheckpointError(
            f"'{folder / CONFIG}' asks for an adapter of {wanted:,} numbers, '{TENSORS}' holds {there:,}"
        )


def _saved_together(opened: Folder) -> dict[str, list[str]] | None:
    """{adapters, active} of the adapters that were saved to a folder in one call, or None."""
    inside = [opened] if opened.holds(TENSORS) else map(opened.inside, opened.folders())
    told = next((told for each in inside if (told := each.metadata().get(_TOGETHER))), None)
    if told is None:
        return None
    folder = opened.path
    try:
        together = json.loads(told)
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
        raise CheckpointError(f"'{folder}' does not say which adapters it holds ({_TOGETHER}): {error}") from error
    return together if all(_of_several(opened, name).holds(TENSORS) for name in names) else None


def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Give the applied `adapter` the values that lie in the folder `path`, which must be of the same method."""
    folder = Path(path)
    method, _, tensors, metadata = read(folder, model)
    entry = engine.applied(model, adapter)
    if method.name != entry.method:
        raise CheckpointError(f"'{folder}' holds {method.name}, the adapter '{adapter}' is {entry.method}")
    fill(model, adapter, tensors, folder, partly_tied=_is_old(metadata))


def read(folder: Path, model: nn.Module) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    """(method, config, tensors by today's names, metadata) of an adapter folder."""
    return adapter_files.read(folder, lambda opened: _read(opened, model))


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
    tied = metadata.get(_TIED) != "false" if "peftcore_version" in metadata else fields.get("ensure_weight_tying")
    fields["ensure_weight_tying"] = False if tied is None else tied
    with _of_plugin(method, opened.path):
        why = method.state.refused(tensors, fields)
        if why is not None:
            raise CheckpointError(f"'{opened.path}' cannot be read: {why}")
        config = method.state.config_on_disk(config_from_disk(opened.path, method, fields), tensors)
        return method, config, dict(method.state.read_tensors(tensors, config)), metadata


def _is_old(metadata: dict[str, str]) -> bool:
    """Was the file written by a peftcore that wrote a tied parameter under one of its names?"""
    return "peftcore_version" in metadata and _TIED not in metadata


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
    with _of_plugin(method, opened.path):
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
            with _of_plugin(method, opened.path):
                if foreign.matches(fields):
                    return method, foreign, fields
    return None


def _read_foreign(
    opened: Folder, model: nn.Module, method: Method, foreign: ForeignFormat, fields: dict[str, Any]
) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    tensors, _ = opened.tensors(foreign.tensors)
    try:
        with _of_plugin(method, opened.path):
            config, tensors = foreign.read(model, fields, tensors)
    except PeftcoreError as error:
        raise CheckpointError(f"'{opened.path}', of {foreign.name}, cannot be read: {error}") from error
    return method, config, tensors, {}


@contextlib.contextmanager
def _of_plugin(method: Method, folder: Path) -> Iterator[None]:
    """Within the block a plugin works on what a file holds: what it did not expect there is an error in the file."""
    try:
        yield
    except PeftcoreError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"'{folder}' holds something that the plugin '{method.name}' cannot use: {type(error).__name__}: {error}"
        ) from error


def _unnamed_heads(model: nn.Module, method: Method, saved: Sequence[str], tensors: dict[str, Tensor]) -> list[str]:
    """Heads that the file holds and its config does not name: for PEFT 'classifier' means 'pre_classifier', too."""

    def in_file(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in base_parameters(model.get_submodule(path))]
        return all(method.state.tensor_name(Train((name,)), name) in tensors for name in names)

    return [head for head in detect(model).task_heads if head not in saved and in_file(head)]
