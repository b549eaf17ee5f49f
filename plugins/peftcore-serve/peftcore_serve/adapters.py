"""The adapters in memory. Requests load adapters, and the least recently used adapter is evicted at the limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peftcore_cli import base_and_adapter
from torch import nn

import peftcore
from peftcore import PeftcoreError
from peftcore.files import vocabulary_rows
from peftcore.plugin import safe_reading
from peftcore_serve.decoding import can_batch
from peftcore_serve.folders import Folder, Stamp


@dataclass
class LoadedAdapter:
    """An adapter in memory.

    Args:
        key: name of the adapter in the model.
        stamp: state of the adapter's files when they were read.
        by_sample: whether each sample of a batch can use a different adapter.
    """

    key: str
    stamp: Stamp
    by_sample: bool


class Adapters:
    """The adapters of a model, at most `limit` in memory. Not thread-safe.

    Args:
        model: the model, without adapters.
        limit: maximum number of adapters in memory.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.model, self.limit = model, limit
        self.by_name: dict[str, LoadedAdapter] = {}  # ordered from the least to the most recently used
        self._count = 0
        self._active: object = None
        # {content of adapter_config.json: whether such adapters can be batched}
        self._can_batch: dict[bytes, bool] = {}
        self.batches = can_batch(model, self.activate, self.activate_alone, None)

    def ensure_loaded(self, folder: Folder, names_in_use: Collection[str]) -> LoadedAdapter | None:
        """Return the adapter in `folder`, loading it if necessary, or None while adapters in use leave no room.

        Args:
            folder: the adapter on disk.
            names_in_use: names of the adapters that running sequences use.

        Raises:
            PeftcoreError: the adapter cannot be loaded. Other adapters are unchanged.
        """
        adapter = self.by_name.get(folder.name)
        if adapter is not None and adapter.stamp == folder.stamp:
            self.by_name[folder.name] = self.by_name.pop(folder.name)
            return adapter
        if adapter is not None:  # the files have changed since they were read
            if folder.name in names_in_use:
                return None
            self._remove(folder.name)
        while len(self.by_name) >= self.limit:
            oldest = next((name for name in self.by_name if name not in names_in_use), None)
            if oldest is None:
                return None
            self._remove(oldest)
        return self._load(folder)

    def activate(self, keys: Sequence[str | None]) -> None:
        """Activate an adapter for each sample of a batch; None is the base model alone."""
        self._activate(("samples", *keys))

    def activate_alone(self, key: str | None) -> None:
        """Activate an adapter for whole batches, or with None only the base model."""
        self._activate(("alone", key))

    def _activate(self, selection: tuple[str | None, ...]) -> None:
        if self._active == selection or not self.by_name:
            return
        self._active = None
        kind, *keys = selection
        if kind == "alone" or not any(keys):
            peftcore.activate(self.model, [key for key in keys if key is not None])
        else:
            peftcore.activate(self.model, keys, per_sample=True)
        self._active = selection

    def _load(self, folder: Folder) -> LoadedAdapter:
        base_rows, rows = base_and_adapter.vocabulary(self.model), vocabulary_rows(self.model, folder.path)
        if rows is not None and rows != base_rows:
            raise PeftcoreError(
                f"the adapter '{folder.name}' has a vocabulary of {rows:,} tokens, but the base has {base_rows:,}. "
                "Merge the adapter (peftcore merge) and serve the merged model"
            )
        self._count += 1
        key = f"{folder.name.replace('.', '_')} {self._count}"
        # peftcore.load raises while samples have separate adapters.
        self.activate_alone(None)
        self._active = None
        peftcore.load(self.model, folder.path, adapter=key, trainable=False)
        adapter = self.by_name[folder.name] = LoadedAdapter(key, folder.stamp, False)
        config = bytes(safe_reading.read_bytes(folder.path / safe_reading.CONFIG, safe_reading.JSON_BYTES))
        if self.batches and config not in self._can_batch:
            self._can_batch[config] = can_batch(self.model, self.activate, self.activate_alone, key)
        adapter.by_sample = self.batches and self._can_batch[config]
        return adapter

    def _remove(self, name: str) -> None:
        self._active = None
        peftcore.remove(self.model, self.by_name.pop(name).key)
