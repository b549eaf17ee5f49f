"""Adapters kept on disk: they are read when they are named, and the least recently used are dropped to make room.

    load(..., resident=False)     reads an adapter, checks that it fits the model, and drops it
    activate, save, combine, ...  read the adapters they name; `set_resident_limit` bounds the bytes held in memory

Only unchanged adapters are dropped. One that was changed, or that trains, stays like any other adapter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.base_modules import base_parameters
from peftcore.adaptation.light import parts
from peftcore.engine.scaling import set_multiplier
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import CheckpointError, PeftcoreError, warn
from peftcore.events import adapters_wanted
from peftcore.files.fitting import fill_applied, fitting
from peftcore.files.folder import Folder, read_folder
from peftcore.files.reading import Stored, adapter_folder, read_saved
from peftcore.method import Model
from peftcore.observation import assumed_unchanged
from peftcore.targets.patterns import limited

Stamp = dict[str, str]  # {name of a file of the adapter: hash of its content}


@dataclass
class OnDisk:
    """An adapter that may be on disk only, and its state when it was read.

    Args:
        folder: absolute path.
        method, dtype, check_base: arguments of `load`.
        stamp: hashes of its files.
        size: bytes in memory.
        multiplier: the factor set by `scale`.
        digest: hash of the values as last read, to detect changes.
    """

    folder: str
    method: str | None
    dtype: torch.dtype | None
    check_base: bool
    stamp: Stamp
    size: int = 0
    multiplier: float = 1.0
    digest: bytes = b""


def read_with_stamp(
    folder: Path, model: nn.Module, adapter: str | None, method: str | None
) -> tuple[dict[str, list[str]] | None, dict[str, Stored], Stamp]:
    """Return the result of `read_saved` and the hash of each file that was read."""

    def look(opened: Folder) -> tuple[dict[str, list[str]] | None, dict[str, Stored], Stamp]:
        together, contents = read_saved(opened, model, adapter, method)
        return together, contents, {name: _hash(content).hexdigest() for name, content in opened.read.items()}

    return read_folder(folder, look)


@engine.exclusive("load adapters", base=True)
def register(
    model: nn.Module, folder: Path, adapter: str | None, dtype: torch.dtype | None, check_base: bool, method: str | None
) -> None:
    """Check that the adapters in `folder` fit, and register them without keeping them in memory."""
    _refuse_sharded(model)
    engine.refuse_adapters_of_others(model)
    together, contents, stamp = read_with_stamp(folder, model, adapter, method)
    done: list[str] = []
    with assumed_unchanged(model):
        try:
            for name in contents:
                engine.refuse_on_disk(model, name)
                own = adapter_folder(folder, name) if together else folder
                content = contents[name]
                if together:
                    _, read, stamp = read_with_stamp(own, model, name, method)
                    content = read[name]
                record = OnDisk(os.path.abspath(own), method, dtype, check_base, stamp)
                _attach(model, name, record, content)
                done.append(name)
                engine.require_state(model).on_disk[name] = record
                engine.detach_adapter(model, name)
        except BaseException:
            for name in done:
                engine.remove(model, name)
            raise


@engine.exclusive("limit the memory of adapters on disk", base=True)
def set_resident_limit(model: Model, limit: int | None) -> Model:
    """Limit the memory of adapters that were loaded with `resident=False` to `limit` bytes.

    The least recently used ones are dropped first; active ones never are. Other adapters, and those that were changed
    after they were read, do not count.

    Args:
        limit: bytes; None, the default, keeps everything that has been read.

    Returns:
        The model.

    Raises:
        PeftcoreError: the active adapters take more, or the model has no adapter.
    """
    state = engine.require_state(model)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise PeftcoreError(f"set_resident_limit takes a number of bytes or None, found {limit!r}")
    _check_room(state, [], state.active, limit)
    before, state.limit = state.limit, limit
    try:
        _make_room(model, state, 0, state.active)
    except BaseException:
        state.limit = before
        raise
    return model


@limited()
@engine.exclusive("read adapters from disk", base=True)
def read_named(model: nn.Module, names: Sequence[str], keep: Sequence[str]) -> None:
    """Read those of `names` that are on disk; adapters outside `keep` may be dropped to make room.

    All files are checked before anything is changed.
    """
    state = engine.state_of(model)
    wanted = [name for name in dict.fromkeys(names) if name in state.on_disk] if state is not None else []
    if state is None or not wanted:
        return
    for name in wanted:
        state.on_disk[name] = state.on_disk.pop(name)  # the last one is the most recently used
    missing = [name for name in wanted if name not in state.applied]
    if not missing:
        return
    _refuse_sharded(model)
    engine.refuse_merged(state, f"read '{missing[0]}' from disk")
    engine.refuse_changed(model)
    _check_room(state, wanted, keep, state.limit)
    with assumed_unchanged(model):
        contents = {name: _read_again(model, name, state.on_disk[name]) for name in missing}
        _make_room(model, state, sum(state.on_disk[name].size for name in missing), (*wanted, *keep))
        for name in missing:
            _attach(model, name, state.on_disk[name], contents[name])


adapters_wanted.subscribe(read_named)


def _attach(model: nn.Module, name: str, record: OnDisk, content: Stored) -> None:
    """Attach the adapter to `model`, inactive and frozen, and record its values."""
    folder = Path(record.folder)
    fit = fitting(model, folder, content, record.check_base)
    if fit.trained:
        raise PeftcoreError(
            f"'{folder}' cannot be loaded with resident=False: it trains '{fit.trained[0]}' of the base. Load it with "
            "resident=True"
        )
    engine.apply_to_fill(model, fit.to_fill, adapter=name, dtype=record.dtype, active=False, trainable=False)
    try:
        fill_applied(model, name, folder, content)
        if TrainedParameters.of(model, name) is not None:
            raise PeftcoreError(
                f"'{folder}' cannot be loaded with resident=False: it has its own copies of base tensors, such as "
                "buffers that training moves, or a resized vocabulary. Load it with resident=True"
            )
        set_multiplier(model, name, record.multiplier if record.digest else fit.multiplier)
        record.multiplier = engine.applied(model, name).multiplier
        record.size = sum(tensor.nbytes for tensor in _tensors(model, name))
        record.digest = _digest(model, name)
    except BaseException:
        engine.detach_adapter(model, name)
        raise


def _read_again(model: nn.Module, name: str, record: OnDisk) -> Stored:
    again = f"Restore it, or remove the adapter: peftcore.remove(model, '{name}')"
    try:
        _, contents, stamp = read_with_stamp(Path(record.folder), model, name, record.method)
    except CheckpointError as error:
        raise CheckpointError(f"the adapter '{name}' is on disk and cannot be read: {error}. {again}") from error
    if stamp != record.stamp:
        raise CheckpointError(
            f"the adapter '{name}' is on disk, and '{record.folder}' has changed since it was loaded. "
            f"{again}, and load it again"
        )
    return contents[name]


def _check_room(state: engine.State, wanted: Sequence[str], keep: Sequence[str], limit: int | None) -> None:
    """Raise a PeftcoreError if the adapters that are needed at the same time exceed the limit."""
    needed = dict.fromkeys(name for name in (*wanted, *keep) if name in state.on_disk)
    size = sum(state.on_disk[name].size for name in needed)
    if limit is not None and size > limit:
        raise PeftcoreError(
            f"{len(needed)} adapters on disk are needed at the same time ({', '.join(list(needed)[:3])}"
            f"{', ...' if len(needed) > 3 else ''}) and take {size:,} bytes, but the limit is {limit:,}. Use fewer "
            "adapters per batch, or raise the limit: peftcore.set_resident_limit(model, BYTES)"
        )


def _make_room(model: nn.Module, state: engine.State, coming: int, keep: Sequence[str]) -> None:
    """Drop the least recently used adapters until `coming` bytes fit."""
    here = {name: record.size for name, record in state.on_disk.items() if name in state.applied}
    total = coming + sum(here.values())
    needed = {branch for entry in state.applied.values() for branch in entry.branches}
    for name, size in here.items():
        if state.limit is None or total <= state.limit:
            return
        if name in keep or name in needed:
            continue
        total -= size
        record = state.on_disk[name]
        if _was_changed(model, name, record):
            del state.on_disk[name]
            warn(
                f"the adapter '{name}' was changed after it was read from '{record.folder}', so it stays in memory and "
                "does not count for the limit. Save it, and load that folder with resident=False",
            )
        else:
            record.multiplier = engine.applied(model, name).multiplier
            engine.detach_adapter(model, name)
    if state.limit is not None and total > state.limit:
        raise PeftcoreError(
            f"adapters from disk would take {total:,} bytes, but the limit is {state.limit:,}, and the ones in memory "
            "are combined by others. Raise the limit: peftcore.set_resident_limit(model, BYTES)"
        )


def _was_changed(model: nn.Module, name: str, record: OnDisk) -> bool:
    if engine.applied(model, name).trainable or any(tensor.requires_grad for tensor in _tensors(model, name)):
        return True
    return _digest(model, name) != record.digest


def _tensors(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Yield the adapter's parameters and buffers, each once."""
    seen: set[int] = set()
    for _, adapter in engine.adapter_modules(model, name):
        for module in parts(adapter):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def _digest(model: nn.Module, name: str) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(model, name):
        flat: Any = tensor.detach().contiguous().cpu().flatten()
        found.update(flat.view(torch.uint8).numpy())
    return found.digest()


def _hash(content: bytearray) -> Any:
    return hashlib.blake2b(content, digest_size=32)


def _refuse_sharded(model: nn.Module) -> None:
    if any(ranks.is_part(parameter) for _, parameter in base_parameters(model)):
        raise PeftcoreError(
            "the model is sharded, so adapters cannot stay on disk: all ranks would have to read them together. Load "
            "them with resident=True, before peftcore.shard"
        )
