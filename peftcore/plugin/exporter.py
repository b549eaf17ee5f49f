"""Description of an export format, for `peftcore.export` and `peftcore export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("adapter", "model")


@dataclass(frozen=True)
class NoOptions:
    """Options class of a format without options."""


@dataclass(frozen=True)
class Exporter:
    """A format for other programs, with functions that write an adapter, a whole model, or both.

    Args:
        name: value of `peftcore.export(format=)` and of `--format`.
        programs: programs that read the format, such as `llama.cpp, Ollama`; for help texts.
        write_adapter: (model, path, adapter, options) -> None, writes the applied adapter with this name; the folder of
            `path` exists. None if the format does not support adapters.
        write_model: (model, path, options) -> None, writes the whole model. None if the format does not support models.
        options: frozen dataclass of the format's options, which are passed as keyword arguments of `peftcore.export`
            and with `--set`. The command line fills fields named `tokenizer` and `chat_template` from the run.
        adapter_file: name of an adapter's file in the folder that the command line writes. Empty if `write_adapter`
            writes the folder itself.
        model_file: likewise for `write_model`. Options are filled in: `model-{gguf_type}.gguf`.
        with_adapters: whether `write_model` also writes active adapters. Otherwise active adapters must have been
            merged.
        check: (model) -> None, raises a `PeftcoreError` for an unsupported model before any file is written.
        usage: (path, base, part) -> commands that use the written files. `part` is `adapter` or `model`, and `base` the
            hub id or path of the base model.
        remarks: (path, base, part) -> sentences about limitations of the written files.
    """

    name: str
    programs: str
    write_adapter: Callable[[Any, Path, str, Any], None] | None = None
    write_model: Callable[[Any, Path, Any], None] | None = None
    options: type = NoOptions
    adapter_file: str = ""
    model_file: str = ""
    with_adapters: bool = False
    check: Callable[[Any], object] = lambda model: None
    usage: Callable[[Path, str, str], Sequence[str]] = lambda path, base, part: ()
    remarks: Callable[[Path, str, str], Sequence[str]] = lambda path, base, part: ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Return which of `adapter` and `model` the format supports."""
        writers = (self.write_adapter, self.write_model)
        return tuple(part for part, write in zip(PARTS, writers, strict=True) if write is not None)
