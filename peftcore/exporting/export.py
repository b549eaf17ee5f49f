"""`export`: write a model or an adapter as files for other programs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.errors import PeftcoreError, PluginError, nearest
from peftcore.exporting.onnx import ONNX
from peftcore.exporting.serving import VLLM
from peftcore.files.folder import created_folders
from peftcore.files.saving import save
from peftcore.plugin import sharded
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.exporter import Exporter, NoOptions
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.registry import builtin, registry
from peftcore.plugin.validation import check_types

_PACKAGES = {"gguf": "peftcore-gguf"}  # formats in separate packages


def _write_peft(model: nn.Module, path: Path, adapter: str, _options: NoOptions) -> None:
    save(model, path, adapter=adapter, resumable=False)


PEFT = Exporter(
    "peft",
    "PEFT",
    write_adapter=_write_peft,
    usage=lambda path, base, part: [f"peft.PeftModel.from_pretrained(model, {str(path)!r})"],
)


@hookimpl
def peftcore_exporters() -> list[Exporter]:
    return [PEFT, VLLM, ONNX]


builtin(sys.modules[__name__])


def export(
    model: nn.Module, path: str | os.PathLike[str], *, format: str, adapter: str | None = None, **options: Any
) -> Path:
    """Write a model or an adapter in the format of another program. The model is not changed.

    Args:
        model: the model.
        path: file or folder to write.
        format: name of the format. "vllm" writes a folder with the adapter for vLLM and SGLang, with one rank and scale
            for all modules; "peft" a folder for PEFT, as `save` does; "onnx" a file with the model in evaluation mode
            and its active adapters, merged or not. "gguf" (from the package peftcore-gguf) writes a file for llama.cpp
            and Ollama: the adapter if `adapter` is given, otherwise the model with its current weights, so merge
            adapters first. Other packages can add formats; `peftcore export` lists all of them.
        adapter: name of the adapter to write. Formats that only write adapters need it only if the model has several
            adapters.
        options: options of the format. "gguf" has `tokenizer` (a transformers tokenizer, or the path of a GGUF file
            that contains one; required for a model), `gguf_type` and `chat_template`.

    Returns:
        The path.

    Raises:
        PeftcoreError: the format is not installed or has no such option, the other program would compute something
            else, or the files cannot be written. `convert` makes a low-rank adapter from any adapter that changes
            weights.
        PluginError: the package of the format failed.

    Examples:
        >>> peftcore.export(model, "served", format="vllm", adapter="default")
        >>> peftcore.merge(model)
        >>> peftcore.export(model, "model.gguf", format="gguf", tokenizer=tokenizer, gguf_type="q8_0")
    """
    exporter = find(format)
    format_options, target = options_of(exporter, options), Path(path)
    exporter.check(model)
    if adapter is not None or exporter.write_model is None:
        if exporter.write_adapter is None:
            raise PeftcoreError(
                f"format='{format}' writes complete models, so it does not take adapter='{adapter}'. Leave it out, "
                "and choose the active adapters with peftcore.activate"
            )
        name = _only(model) if adapter is None else adapter
        with _folder_of(target):
            exporter.write_adapter(model, target, name, format_options)
    else:
        _refuse(model, exporter)
        with _folder_of(target):
            exporter.write_model(model, target, format_options)
    return target


def formats() -> dict[str, Exporter]:
    """Return the installed formats by name, sorted.

    Errors in their functions are raised as a PluginError that names the plugin.

    Raises:
        PluginError: two packages define a format with the same name.
    """
    return {name: _naming_plugin(plugin, exporter) for name, (plugin, exporter) in sorted(registry.exporters().items())}


def _naming_plugin(plugin: Plugin, exporter: Exporter) -> Exporter:
    """Return a format whose functions raise errors that name its plugin."""

    def named(name: str) -> Callable[..., Any] | None:
        function: Callable[..., Any] | None = getattr(exporter, name)
        if function is None:
            return None

        def call(*arguments: Any) -> Any:
            with registry.naming(plugin, name):
                return function(*arguments)

        return call

    functions: dict[str, Any] = {name: named(name) for name in _FUNCTIONS}
    return dataclasses.replace(exporter, **functions)


_FUNCTIONS = ("check", "write_adapter", "write_model", "usage", "remarks")


def find(format: str) -> Exporter:
    """Return a format by its name.

    Raises:
        PeftcoreError: the format is not installed.
    """
    installed_formats = formats()
    if format in installed_formats:
        return installed_formats[format]
    names = ", ".join(sorted(installed_formats))
    broken = next((plugin for plugin in registry.plugins() if plugin.name == format and plugin.error), None)
    if broken is not None:
        raise PeftcoreError(f"the format '{format}' belongs to {broken}, which cannot be used: {broken.error}")
    if format in _PACKAGES:
        raise PeftcoreError(
            f"the format '{format}' is not installed (installed: {names}). Install it from a copy of peftcore's "
            f"repository: pip install ./plugins/{_PACKAGES[format]}"
        )
    raise PeftcoreError(f"the format '{format}' is unknown{nearest(format, installed_formats)}. Choose one of: {names}")


def options_of(exporter: Exporter, options: dict[str, Any]) -> Any:
    """Convert keyword arguments to the options of a format.

    Raises:
        PeftcoreError: the format has no such option, or a value has the wrong type.
    """
    option_names = [field.name for field in dataclasses.fields(exporter.options)]
    for name in options:
        if name not in option_names:
            raise PeftcoreError(
                f"the format '{exporter.name}' has no option '{name}'{nearest(name, option_names)}. Its options are: "
                f"{', '.join(option_names) or 'none'}"
            )
    check_types(exporter.options, options)
    return exporter.options(**options)


def model_file(exporter: Exporter, options: dict[str, Any]) -> str:
    """Return the name of a model's file, with the options filled in: `model-{type}.bin` becomes `model-q8.bin`.

    Raises:
        PeftcoreError: as in `options_of`.
        PluginError: the format's file name contains a field that is not one of its options.
    """
    values = options_of(exporter, options)
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    try:
        return exporter.model_file.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise PluginError(
            f"the format '{exporter.name}' has model_file='{exporter.model_file}', which cannot be filled from its "
            f"options ({', '.join(fields) or 'none'}): {error}. Correct it in the package of the format"
        ) from error


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Make the folder of `path` for the block; after an error, remove it if it was created_folders and is empty."""
    with ExitStack() as stack:
        try:
            stack.enter_context(created_folders(path.parent))
        except OSError as error:
            raise PeftcoreError(
                f"cannot create '{path.parent}': {error.strerror or error}. Choose another folder"
            ) from error
        yield


def _refuse(model: nn.Module, exporter: Exporter) -> None:
    """Raise a PeftcoreError if the file would miss a part of the model."""
    sharded.refuse_sharded(model, "export")
    state = engine.state_of(model)
    if state is not None and state.active and not exporter.with_adapters:
        raise PeftcoreError(
            f"the adapters {', '.join(map(repr, state.active))} are active but would be missing in the file. Merge "
            "them with peftcore.merge(model), or deactivate them with peftcore.activate(model, [])"
        )


def _only(model: nn.Module) -> str:
    """Return the name of the model's only adapter."""
    names = list(engine.require_state(model).applied)
    if len(names) != 1:
        raise PeftcoreError(f"the model has several adapters: {names}. Choose one: export(..., adapter=NAME)")
    return names[0]
