"""The folder of adapters: its current adapters, and their tokenizers."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcore_cli import (
    AdapterTask,
    Messages,
    adapter_folders,
    base_and_adapter,
    conversations,
    models,
    text_generation,
)
from peftcore_cli.console import warn

from peftcore import PeftcoreError

_TOKENIZERS = 32  # maximum number of tokenizers in memory
# Maximum number of characters per token of the context. Text has 3 to 5. The longest tokens of a vocabulary are runs of
# 128 spaces or dashes; with that limit, a context of 128k tokens would accept 16 MB, which take minutes to tokenize.
_CHARACTERS = 16
Stamp = tuple[tuple[str, int, int], ...]  # (name, time of the last change, bytes) of each file


@dataclass(frozen=True)
class Folder:
    """An adapter on disk."""

    name: str
    path: Path
    stamp: Stamp


def find(root: Path | None) -> dict[str, Folder]:
    """Return the adapters in the folder `root`, including adapters of runs, as a dict sorted by name."""
    folders = (_folder(root / name) for name in _names(root)) if root is not None else ()
    return {folder.name: folder for folder in folders if folder is not None}


def find_one(root: Path | None, name: str) -> Folder | None:
    """Return the adapter of this name in the folder `root`, or None."""
    return _folder(root / name) if root is not None and name in _names(root) else None


def _folder(directory: Path) -> Folder | None:
    path = adapter_folders.adapter_folder(directory)
    return Folder(directory.name, path, _stamp(path)) if os.path.exists(path / "adapter_config.json") else None


def _names(root: Path | None) -> list[str]:
    """Return the names of the folders in `root`, sorted."""
    if root is None:
        return []
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError as error:
        raise PeftcoreError(
            f"cannot read the folder of adapters '{root}': {error.strerror or error}. Pass another folder: "
            "--adapters FOLDER"
        ) from error
    return sorted(name for name in names if _is_utf8(name))


@functools.lru_cache(maxsize=1024)  # names that were warned about
def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        warn(
            f"the adapter in {name!r} is not served, because the name of its folder is not valid UTF-8. Rename the "
            "folder"
        )
        return False
    return True


def _stamp(path: Path) -> Stamp:
    try:
        with os.scandir(path) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:  # deleted meanwhile
        return ()
    return tuple(sorted((name, status.st_mtime_ns, status.st_size) for name, status in files))


class TooLong(PeftcoreError):
    """A text has more characters than can fit into the model's context."""


class Text:
    """A thread-safe tokenizer with its chat template.

    Args:
        tokenizer: tokenizer of the base model or of an adapter.
        ends: tokens that end an answer.
        context: number of positions of the model. None: no limit.
        refusal: reason why conversations are refused, or an empty string.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], context: int | None = None, refusal: str = "") -> None:
        self.tokenizer, self.ends, self._context, self._refusal = tokenizer, ends, context, refusal
        self.special = frozenset(tokenizer.all_special_ids)  # `decode` skips these tokens
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_characters = None if context is None else context * min(longest, _CHARACTERS)
        # The first call turns off truncation and padding, which the file may enable. Later calls do not change the
        # tokenizer, so threads can call it concurrently, and a long text does not block other requests.
        tokenizer("")

    def tokens(self, prompt: str | Messages) -> list[int]:
        """Return the tokens of a text, or of a conversation up to the beginning of the answer.

        Raises:
            TooLong: the text has more characters than can fit into the context.
            PeftcoreError: there is no chat template, the template rejects the conversation or may not be rendered, or
                the text is empty and the tokenizer has no beginning-of-text token.
        """
        if isinstance(prompt, str):
            self._refuse_long(prompt)
            tokens = self.tokenizer(prompt)["input_ids"]
        else:
            if self._refusal:
                raise PeftcoreError(self._refusal)
            text = conversations.render(self.tokenizer, prompt, begins_answer=True)
            self._refuse_long(text)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(tokens) or [text_generation.first_token(self.tokenizer)]

    def _refuse_long(self, text: str) -> None:
        if self._max_characters is not None and len(text) > self._max_characters:
            raise TooLong(
                f"the prompt has {len(text):,} characters, but the limit for the model's context of "
                f"{self._context:,} tokens is {self._max_characters:,}. Shorten the prompt"
            )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def decode_one(self, token: int) -> str:
        """Return the text of one token, which may be a special token."""
        return str(self.tokenizer.decode([token]))


class Texts:
    """Tokenizers of the base model and of adapters. Adapters without a tokenizer share the base model's tokenizer.

    Args:
        model: the loaded base model.
        base: its folder or hub id.
        chat_template: chat template of all conversations, as in `--chat-template`.
        trust_templates: render chat templates that came with adapters. Templates may loop forever.
        refuse: function of an adapter's name and task that raises an error if the adapter does not fit the base model.
    """

    def __init__(
        self,
        model: Any,
        base: str,
        chat_template: str | None,
        trust_templates: bool = False,
        refuse: Callable[[str, AdapterTask], None] | None = None,
    ) -> None:
        self._model, self._base, self._template, self._refuse = model, base, chat_template, refuse
        self._trust_templates = trust_templates
        self._rows = base_and_adapter.vocabulary(model)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._texts: OrderedDict[tuple[Stamp, str], Text] = (
            OrderedDict()
        )  # ordered from the least to the most recently used
        self._lock = threading.Lock()
        tokenizer = models.load_tokenizer(base)
        conversations.set_template(tokenizer, chat_template)
        self._base_template = tokenizer.chat_template
        self.of_base = self._text(tokenizer)

    def for_adapter(self, folder: Folder) -> Text:
        """Return the tokenizer of an adapter.

        Raises:
            PeftcoreError: the adapter is a classifier, its tokenizer has more tokens than the base model, or its files
                are damaged.
        """
        key = folder.stamp, folder.name
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
                return self._texts[key]
        text = self._load(folder)  # without the lock, so that a large file does not block other requests
        with self._lock:
            self._texts[key] = text
            if len(self._texts) > _TOKENIZERS:
                self._texts.popitem(last=False)
        return text

    def _load(self, folder: Folder) -> Text:
        task = adapter_folders.adapter_task(folder.path)
        adapter_folders.refuse_without_prompts(folder.name, task.task)
        if self._refuse is not None:
            self._refuse(folder.name, task)
        has_own = adapter_folders.has_tokenizer(folder.path)
        if not has_own and (self._template is not None or task.chat_template in (None, self._base_template)):
            return self.of_base
        tokenizer = models.load_tokenizer(self._base, folder.path if has_own else None)
        tokens = max(tokenizer.get_vocab().values()) + 1 if has_own else 0
        if self._rows is not None and tokens > max(self._rows, len(self.of_base.tokenizer)):
            raise PeftcoreError(
                f"the tokenizer of the adapter '{folder.name}' has {tokens:,} tokens, but the base has "
                f"{self._rows:,}. Merge the adapter (peftcore merge) and serve the merged model"
            )
        conversations.set_template(tokenizer, self._template, task.chat_template)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = self._base_template
        trusted_templates = (self._base_template, *conversations.BUILT_IN.values())
        if self._trust_templates or tokenizer.chat_template in trusted_templates:
            return self._text(tokenizer)
        return self._text(
            tokenizer,
            f"the adapter '{folder.name}' has its own chat template, which this server does not render. Start the "
            "server with --chat-template to use one template for all adapters, or with --trust-adapter-templates if "
            "you trust them, or send the prompt as text to /v1/completions",
        )

    def _text(self, tokenizer: Any, refusal: str = "") -> Text:
        ends = frozenset(text_generation.end_tokens(self._model, tokenizer) or ())
        return Text(tokenizer, ends, self._context, refusal)
