"""The adapters in memory: loaded when a request names them; the least recently used leave when there are too many."""

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
class Loaded:
    """An adapter in memory.

    Args:
        key: its name on the model.
        stamp: its files when they were read.
        by_sample: whether it can be given to single samples of a batch.
    """

    key: str
    stamp: Stamp
    by_sample: bool


class Adapters:
    """Adapters of a model, of which at most `limit` are in memory. For one thread.

    Args:
        model: the model, without adapters.
        limit: number of adapters.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.model, self.limit = model, limit
        self.loaded: dict[str, Loaded] = {}  # the last one is the most recently used
        self._count = 0
        self._active: object = None
        self._tried: dict[bytes, bool] = {}  # {adapter_config.json: whether such adapters can be in a batch}
        self.batches = can_batch(model, self.activate, self.activate_alone, None)

    def have(self, folder: Folder, used: Collection[str]) -> Loaded | None:
        """Return the adapter in `folder`, loading it if necessary; None if first an adapter in use has to end.

        Args:
            folder: the adapter on disk.
            used: names of the adapters that running sequences use.

        Raises:
            PeftcoreError: the adapter cannot be loaded. The others are as they were.
        """
        there = self.loaded.get(folder.name)
        if there is not None and there.stamp == folder.stamp:
            self.loaded[folder.name] = self.loaded.pop(folder.name)
            return there
        if there is not None:  # its files have changed
            if folder.name in used:
                return None
            self._remove(folder.name)
        while len(self.loaded) >= self.limit:
            oldest = next((name for name in self.loaded if name not in used), None)
            if oldest is None:
                return None
            self._remove(oldest)
        return self._load(folder)

    def activate(self, keys: Sequence[str | None]) -> None:
        """Give the samples of a batch their adapters; None is the base alone."""
        self._activate(("samples", *keys))

    def activate_alone(self, key: str | None) -> None:
        """Activate an adapter for whole batches; None is the base alone."""
        self._activate(("alone", key))

    def _activate(self, wanted: tuple[str | None, ...]) -> None:
        if self._active == wanted or not self.loaded:
            return
        self._active = None
        kind, *keys = wanted
        if kind == "alone" or not any(keys):
            peftcore.activate(self.model, [key for key in keys if key is not None])
        else:
            peftcore.activate(self.model, keys, per_sample=True)
        self._active = wanted

    def _load(self, folder: Folder) -> Loaded:
        there, rows = base_and_adapter.vocabulary(self.model), vocabulary_rows(self.model, folder.path)
        if rows is not None and rows != there:
            raise PeftcoreError(
                f"the adapter '{folder.name}' has a vocabulary of {rows:,} tokens, but the base has {there:,}. Merge "
                "it (peftcore merge) and serve the merged model"
            )
        self._count += 1
        key = f"{folder.name.replace('.', '_')} {self._count}"
        self.activate_alone(None)  # adapters are not applied while each sample has its own
        self._active = None
        peftcore.load(self.model, folder.path, adapter=key, trainable=False)
        found = self.loaded[folder.name] = Loaded(key, folder.stamp, False)
        config = bytes(safe_reading.read_bytes(folder.path / safe_reading.CONFIG, safe_reading.JSON_BYTES))
        if self.batches and config not in self._tried:
            self._tried[config] = can_batch(self.model, self.activate, self.activate_alone, key)
        found.by_sample = self.batches and self._tried[config]
        return found

    def _remove(self, name: str) -> None:
        self._active = None
        peftcore.remove(self.model, self.loaded.pop(name).key)
