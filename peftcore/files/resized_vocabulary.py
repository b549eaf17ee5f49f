"""Detection of a resized vocabulary.

Files store its new rows, since every load of the base initializes them at random.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftcore.model import detect
from peftcore.model.base_modules import base_parameters
from peftcore.plugin.architecture import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def resized_parameters(model: nn.Module) -> list[str]:
    """Return the names of the embedding's and the output head's parameters if the vocabulary has been resized.

    As in PEFT, the vocabulary is resized if `vocab_size` differs between the model's config and the checkpoint's
    `config.json`, which is read from the model's folder or from Hugging Face's cache, never from the network.
    """
    config = getattr(model, "config", None)
    size, size_of_checkpoint = _vocabulary(config), _vocabulary(_config_of_checkpoint(config))
    if size is None or size_of_checkpoint is None or size == size_of_checkpoint:
        return []
    return embedding_parameters(model)


def embedding_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the token embedding and the output head."""
    architecture = detect(model)
    paths = {path for path in (architecture.embedding, architecture.output_head) if path}
    return [name for name, _ in base_parameters(model) if name.rpartition(".")[0] in paths]


def _vocabulary(config: PretrainedConfig | dict[str, Any] | None) -> int | None:
    """Return the `vocab_size` of the text config."""
    config = text_config(config)
    if isinstance(config, dict):
        size = config.get("vocab_size")
        parts = [part for part in config.values() if isinstance(part, dict)]
        return size if isinstance(size, int) else next(filter(None, map(_vocabulary, parts)), None)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _config_of_checkpoint(config: PretrainedConfig | None) -> dict[str, Any] | None:
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    file: Any = Path(name) / "config.json"
    with suppress(OSError, ValueError, ImportError):  # also for an invalid repository name
        if not file.is_file() and not os.path.isdir(name):
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
        if isinstance(file, (str, Path)):
            fields = json.loads(Path(file).read_text(encoding="utf-8"))
            return fields if isinstance(fields, dict) else None
    return None
