"""The folder of adapters: which adapters it has now, and the tokenizer of each."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcore import PeftcoreError
from peftcore.cli.bases import adapter_folders, base_and_adapter, models
from peftcore.cli.bases.adapter_folders import AdapterTask
from peftcore.cli.data.row import Messages
from peftcore.cli.tasks import conversations, text_generation

_TOKENIZERS = 32  # different ones in memory
Stamp = tuple[tuple[str, int, int], ...]  # (name, time of the last change, bytes) of each file


@dataclass(frozen=True)
class Folder:
    """An adapter as it is on disk now."""

    name: str
    path: Path
    stamp: Stamp


def find(root: Path | None) -> dict[str, Folder]:
    """Return the adapters in the folder `root`, also those in folders of runs, by name and sorted by it."""
    folders = (_folder(root / name) for name in _names(root)) if root is not None else ()
    return {folder.name: folder for folder in folders if folder is not None}


def find_one(root: Path | None, name: str) -> Folder | None:
    """Return the adapter of this name in the folder `root`, or None."""
    return _folder(root / name) if root is not None and name in _names(root) else None


def _folder(where: Path) -> Folder | None:
    path = adapter_folders.adapter_folder(where)
    return Folder(where.name, path, _stamp(path)) if os.path.exists(path / "adapter_config.json") else None


def _names(root: Path | None) -> list[str]:
    """Return the names of the folders in `root`, sorted."""
    if root is None:
        return []
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise PeftcoreError(f"the folder of adapters '{root}' cannot be read: {error.strerror or error}") from error


def _stamp(path: Path) -> Stamp:
    try:
        with os.scandir(path) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:  # deleted meanwhile
        return ()
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in files))


class Text:
    """A tokenizer with its chat template; threads may share it."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self.tokenizer, self.ends, self._lock = tokenizer, ends, threading.Lock()
        self.special = frozenset(tokenizer.all_special_ids)  # left out by `decode`

    def tokens(self, prompt: str | Messages) -> list[int]:
        """Return the tokens of a text, or of a conversation up to the beginning of the answer.

        Raises:
            PeftcoreError: there is no chat template, it rejects the conversation, or the text is empty and the
                tokenizer has no token to begin with.
        """
        with self._lock:
            if isinstance(prompt, str):
                found = self.tokenizer(prompt)["input_ids"]
            else:
                text = conversations.rendered(self.tokenizer, prompt, begins_answer=True)
                found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return list(found) or [text_generation.first_token(self.tokenizer)]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        with self._lock:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def decode_one(self, token: int) -> str:
        """Return the text of one token, also of a special one."""
        with self._lock:
            return str(self.tokenizer.decode([token]))


class Texts:
    """Tokenizers of the base and of adapters. Adapters with equal files share one.

    Args:
        model: the loaded base.
        base: its folder or hub id.
        chat_template: the user's template for all, as `--chat-template` takes it.
        refuse: called with the name and the task of each adapter, to raise an error if it does not fit the base.
    """

    def __init__(
        self, model: Any, base: str, chat_template: str | None, refuse: Callable[[str, AdapterTask], None] | None = None
    ) -> None:
        self._model, self._base, self._template, self._refuse = model, base, chat_template, refuse
        self._rows = base_and_adapter.vocabulary(model)
        self._known: OrderedDict[str, Text] = OrderedDict()
        self._checked: dict[str, tuple[Stamp, str]] = {}  # of each adapter
        self._lock = threading.Lock()
        self.of_base = self._load(None, None)

    def of(self, folder: Folder) -> Text:
        """Return the tokenizer of an adapter.

        Raises:
            PeftcoreError: the adapter is a classifier's, its tokenizer has tokens that the base's does not have, or its
                files are broken.
        """
        with self._lock:
            stamp, key = self._checked.get(folder.name, ((), ""))
            if stamp != folder.stamp or key not in self._known:
                key = self._check(folder)
                self._checked[folder.name] = folder.stamp, key
            self._known.move_to_end(key)
            while len(self._known) > _TOKENIZERS:
                self._known.popitem(last=False)
            return self._known[key]

    def _check(self, folder: Folder) -> str:
        task = adapter_folders.adapter_task(folder.path)
        adapter_folders.refuse_without_prompts(folder.name, task.task)
        if self._refuse is not None:
            self._refuse(folder.name, task)
        own = adapter_folders.has_tokenizer(folder.path)
        found = hashlib.blake2b(repr(task.chat_template).encode(), digest_size=16)
        for name, _, _ in folder.stamp if own else ():
            if not name.endswith((".safetensors", ".bin")) and name not in (
                "adapter_config.json",
                adapter_folders.TASK_FILE,
            ):
                found.update(name.encode() + b"\0")
                found.update((folder.path / name).read_bytes())
        key = found.hexdigest()
        if key not in self._known:
            text = self._load(folder.path if own else None, task.chat_template)
            tokens = max(text.tokenizer.get_vocab().values()) + 1 if own else 0
            if self._rows is not None and tokens > max(self._rows, len(self.of_base.tokenizer)):
                raise PeftcoreError(
                    f"the tokenizer of the adapter '{folder.name}' has {tokens:,} tokens, but the base has "
                    f"{self._rows:,}. Merge the adapter (peftcore merge) and serve the merged model"
                )
            self._known[key] = text
        return key

    def _load(self, path: Path | None, template: str | None) -> Text:
        tokenizer = models.load_tokenizer(self._base, path)
        conversations.set_template(tokenizer, self._template, template)
        return Text(tokenizer, frozenset(text_generation.ends(self._model, tokenizer) or ()))
