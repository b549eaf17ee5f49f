"""`peftcore export`: write a model or an adapter in the format of another program."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.errors import PeftcoreError, PluginError
from peftcore_cli import options
from peftcore_cli.console import say, table, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcore.plugin import Exporter
    from peftcore_cli.bases.adapter_folders import AdapterTask

EXAMPLES = (
    "peftcore export",
    "peftcore export run --format gguf --set gguf_type=q8_0",
    "peftcore export run --format vllm -o served",
)


def export(
    format: Annotated[
        str | None, typer.Option(help=("Format to write; without --format, the available formats are listed."))
    ] = None,
    adapter: options.MaybeAdapter = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=("New folder to write to; default: a folder next to the adapter.")),
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help=("Set an option of the format, such as gguf_type=q8_0. Repeatable.")
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help=("What to write, for formats that support both: adapter, or model (with the adapter merged).")
        ),
    ] = None,
    convert: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Write a low-rank approximation of the adapter with this rank."),
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Untie an adapted embedding from the output head.")] = False,
    quantize: options.Quantize = None,
    dtype: options.WrittenDtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Export an adapter or a merged model for another program.

    Some formats hold adapters, some hold models, and some both. If the other program would compute different outputs,
    the export fails with the reason. Without an adapter, the base itself is exported.
    """
    from peftcore import exporting
    from peftcore_cli.bases import adapter_folders, base_and_adapter, base_files, base_quantization, models

    if format is None:
        _list_formats()
        return
    exporter = exporting.find(format)
    format_options = _options(exporter, settings)
    _refuse_part(exporter, only, adapter, model, convert)
    folder = _check_new(output or _default_folder(adapter, str(model), format))
    task = adapter_folders.adapter_task(adapter) if adapter else adapter_folders.AdapterTask("causal-lm", 512)
    base = base_files.resolve(adapter_folders.base_of(adapter, model) if adapter else str(model))
    base_as = base_quantization.of_adapter(quantize, adapter, task)
    loaded_model = models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=base_as)
    name: str | None = None
    if adapter is not None:
        base_and_adapter.load_adapter(loaded_model, adapter)
        name = _adapter_to_write(loaded_model, convert)
    work = _Work(exporter, format_options, folder, loaded_model, base)
    exporter.check(loaded_model)
    with complete_or_removed(folder, work.paths):
        if name is not None and "adapter" in exporter.parts and only != "model":
            work.write_adapter(name, required=only == "adapter" or "model" not in exporter.parts)
        if "model" in exporter.parts and only != "adapter":
            if name is not None and not exporter.with_adapters:
                base_and_adapter.merge_adapter(loaded_model, untie=untie, quantize=base_as, dtype=dtype, device=device)
            _add_tokenizer(exporter, format_options, base, adapter, task)
            work.write_model()
    for line in work.report:
        say(line)


@dataclass
class _Work:
    """The files of one export, and the report that is printed at the end."""

    exporter: Exporter
    options: dict[str, Any]
    folder: Path
    model: PreTrainedModel
    base: str
    report: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)  # reports of all files, including files that could not be written

    def write_adapter(self, adapter: str, required: bool) -> None:
        """Write the adapter. If the format cannot represent the adapter, warn, or raise if the adapter is required."""
        import peftcore

        path = self.folder / self.exporter.adapter_file
        self.paths.append(path)
        try:
            peftcore.export(self.model, path, format=self.exporter.name, adapter=adapter, **self.options)
        except PeftcoreError as error:
            if required or isinstance(error, PluginError):
                raise
            hint = ". --convert RANK writes an approximation" if "convert" in str(error) else ""
            warn(f"{error}. {path.name} was not written{hint}")
            return
        self._add(path, "adapter")

    def write_model(self) -> None:
        """Write the model with its current weights."""
        import peftcore
        from peftcore import exporting

        path = self.folder / exporting.model_file(self.exporter, self.options)
        self.paths.append(path)
        peftcore.export(self.model, path, format=self.exporter.name, **self.options)
        self._add(path, "model")

    def _add(self, path: Path, part: str) -> None:
        label = f"{path} ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else str(path)
        usage = self.exporter.usage(path, self.base, part)
        remarks = self.exporter.remarks(path, self.base, part)
        self.report += [f"{label}: {command}" for command in usage] or [label]
        for remark in remarks:
            warn(remark)


def _list_formats() -> None:
    """Print the installed formats with their parts and options."""
    from peftcore import exporting

    def options(exporter: Exporter) -> str:
        fields = (option for option in dataclasses.fields(exporter.options) if option.name not in _FROM_THE_RUN)
        return ", ".join(f"{option.name}={option.default}" for option in fields)

    exporters = exporting.formats().values()
    rows = ((one.name, one.programs, " and ".join(one.parts), options(one)) for one in exporters)
    table(rows, ("format", "for", "writes", "options (--set)"))


_FROM_THE_RUN = ("tokenizer", "chat_template")  # options with defaults from the run


def _options(exporter: Exporter, settings: list[str] | None) -> dict[str, Any]:
    from peftcore_cli.fields import parse

    return parse(exporter.options, settings or [])


def _add_tokenizer(
    exporter: Exporter, format_options: dict[str, Any], base: str, adapter: Path | None, task: AdapterTask
) -> None:
    """Fill in the run's tokenizer and chat template for formats that have these options, unless the user set them."""
    run_options = {option.name for option in dataclasses.fields(exporter.options)} & {*_FROM_THE_RUN}
    if run_options - format_options.keys():
        for name, value in zip(_FROM_THE_RUN, _tokenizer(base, adapter, task), strict=True):
            if name in run_options:
                format_options.setdefault(name, value)


def _refuse_part(
    exporter: Exporter, part: str | None, adapter: Path | None, model: str | None, convert: int | None
) -> None:
    """Raise a PeftcoreError if the format does not support the part to write, or a required adapter is missing."""
    from peftcore import exporting

    if part is not None and part not in exporter.parts:
        raise PeftcoreError(
            f"--only must be {' or '.join(exporter.parts)} for the format '{exporter.name}', found '{part}'"
        )
    if adapter is not None or (model and "model" in exporter.parts and part != "adapter" and convert is None):
        return
    model_formats = [name for name, format_exporter in exporting.formats().items() if "model" in format_exporter.parts]
    raise PeftcoreError(
        "no adapter was given. Pass the folder of one, or export a model alone (--model) to "
        f"{' or '.join(model_formats)}"
    )


def _tokenizer(base: str, adapter: Path | None, task: AdapterTask) -> tuple[Any, str | None]:
    """Return the tokenizer, and the chat template that overrides its own; training may save both."""
    from peftcore_cli.bases import adapter_folders, models
    from peftcore_cli.tasks import registered

    tokenizer = registered.find(task.task).load_processor(base, adapter)
    has_tokenizer = adapter is not None and adapter_folders.has_tokenizer(adapter)
    chat_template = task.chat_template
    if not base.endswith(".gguf"):
        return tokenizer, chat_template
    if has_tokenizer and tokenizer.get_vocab() != models.load_tokenizer(base).get_vocab():
        return tokenizer, chat_template
    # The exporter copies the tokenizer from the .gguf file, whose template may differ from the adapter's.
    return base, chat_template or (tokenizer.chat_template if has_tokenizer else None)


def _default_folder(adapter: Path | None, model: str, format: str) -> Path:
    """Return `run/gguf` for the adapter of a run, or a folder next to any other adapter or model."""
    if adapter is None:
        return Path(f"{Path(model).name.removesuffix('.gguf')}-{format}")
    return adapter.with_name(format) if adapter.name == "adapter" else adapter.with_name(f"{adapter.name}-{format}")


def _check_new(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PeftcoreError(f"'{folder}' exists already. Pass a new folder: --output FOLDER")
    return folder


@contextmanager
def complete_or_removed(folder: Path, paths: list[Path]) -> Iterator[None]:
    """If the block raises, remove the files that it wrote to `folder`, which was new or empty, and nothing else.

    Args:
        folder: the folder.
        paths: files and folders that the block writes. Files named `PATH.*` are also removed.
    """
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except BaseException:
        for entry in list(folder.iterdir()) if folder.is_dir() else ():
            if any(f"{entry.name}.".startswith(f"{path.name}.") for path in paths):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for parent in new_folders:
            with suppress(OSError):  # the folder does not exist, or another process wrote to it
                parent.rmdir()
        raise


def _adapter_to_write(model: PreTrainedModel, rank: int | None) -> str:
    """Return the name of the adapter to write, after making a low-rank approximation if `rank` is given."""
    import peftcore

    names = [adapter.name for adapter in peftcore.summary(model).adapters]
    if len(names) != 1:
        raise PeftcoreError(
            f"the folder contains several adapters: {', '.join(names)}. Pass the folder of a single adapter"
        )
    (name,) = names
    if rank is None:
        return name
    method = next(key for key, candidate in peftcore.methods().items() if candidate.low_rank is not None)
    kept_norm = peftcore.convert(model, name, method=method, r=rank, adapter="converted")
    say(
        f"rank {rank} preserves at least {min(kept_norm.values()):.1%} of the norm of the adapter's change in every "
        "layer"
    )
    return "converted"
