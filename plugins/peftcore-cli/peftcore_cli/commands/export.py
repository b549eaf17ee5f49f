"""`peftcore export`: write a model or an adapter for another program, in a format of the core or of a plugin."""

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
    format: Annotated[str | None, typer.Option(help="Format to write; without it, the formats are listed.")] = None,
    adapter: options.MaybeAdapter = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; by default next to the adapter.")
    ] = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # the application reads it
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the format. Repeatable.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Part to write if the format has both: adapter, or model (merged).")
    ] = None,
    convert: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Rank of a low-rank approximation to write in place of the adapter."),
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give an adapted tied embedding its own weight.")] = False,
    quantize: options.Quantize = None,
    dtype: options.WrittenDtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Write files for another program, or explain why that program would compute something else.

    A format may have adapters, models or both. Models are merged first; without an adapter the base itself is written.
    """
    from peftcore import exporting
    from peftcore_cli.bases import adapter_folders, base_and_adapter, base_files, base_quantization, models

    if format is None:
        _list_formats()
        return
    exporter = exporting.find(format)
    given = _options(exporter, settings)
    _refuse_part(exporter, only, adapter, model, convert)
    folder = _new(output or _default_folder(adapter, str(model), format))
    task = adapter_folders.adapter_task(adapter) if adapter else adapter_folders.AdapterTask("causal-lm", 512)
    base = base_files.resolve(adapter_folders.base_of(adapter, model) if adapter else str(model))
    base_as = base_quantization.of_adapter(quantize, adapter, task)
    loaded = models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=base_as)
    name: str | None = None
    if adapter is not None:
        base_and_adapter.load_adapter(loaded, adapter)
        name = _converted(loaded, convert)
    work = _Work(exporter, given, folder, loaded, base)
    exporter.check(loaded)
    with complete_or_removed(folder, work.paths):
        if name is not None and "adapter" in exporter.parts and only != "model":
            work.write_adapter(name, required=only == "adapter" or "model" not in exporter.parts)
        if "model" in exporter.parts and only != "adapter":
            if name is not None and not exporter.with_adapters:
                base_and_adapter.merge_adapter(loaded, untie=untie, quantize=base_as, dtype=dtype, device=device)
            _add_tokenizer(exporter, given, base, adapter, task)
            work.write_model()
    for line in work.report:
        say(line)


@dataclass
class _Work:
    """Files of one export, and the report that is printed once all of them are written."""

    exporter: Exporter
    options: dict[str, Any]
    folder: Path
    model: PreTrainedModel
    base: str
    report: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)  # also of files that could not be written

    def write_adapter(self, adapter: str, required: bool) -> None:
        """Write the adapter; if that is impossible and not required, warn."""
        import peftcore

        path = self.folder / self.exporter.adapter_file
        self.paths.append(path)
        try:
            peftcore.export(self.model, path, format=self.exporter.name, adapter=adapter, **self.options)
        except PeftcoreError as error:
            if required or isinstance(error, PluginError):
                raise
            hint = ". --convert RANK makes it one that can be written" if "convert" in str(error) else ""
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
    """Print the installed formats, their parts and options."""
    from peftcore import exporting

    def options(exporter: Exporter) -> str:
        fields = (each for each in dataclasses.fields(exporter.options) if each.name not in _FROM_THE_RUN)
        return ", ".join(f"{each.name}={each.default}" for each in fields)

    exporters = exporting.formats().values()
    rows = ((each.name, each.programs, " and ".join(each.parts), options(each)) for each in exporters)
    table(rows, ("format", "for", "writes", "options (--set)"))


_FROM_THE_RUN = ("tokenizer", "chat_template")  # options that the command line knows from the run


def _options(exporter: Exporter, settings: list[str] | None) -> dict[str, Any]:
    from peftcore_cli.fields import parse

    return parse(exporter.options, settings or [])


def _add_tokenizer(
    exporter: Exporter, given: dict[str, Any], base: str, adapter: Path | None, task: AdapterTask
) -> None:
    """Add the tokenizer and chat template of the run, unless they were given, if the format has these options."""
    known = {each.name for each in dataclasses.fields(exporter.options)} & {*_FROM_THE_RUN}
    if known - given.keys():
        for name, value in zip(_FROM_THE_RUN, _tokenizer(base, adapter, task), strict=True):
            if name in known:
                given.setdefault(name, value)


def _refuse_part(
    exporter: Exporter, only: str | None, adapter: Path | None, model: str | None, convert: int | None
) -> None:
    """Raise a PeftcoreError if the format does not have the part to write, or the adapter to write is missing."""
    from peftcore import exporting

    if only is not None and only not in exporter.parts:
        raise PeftcoreError(
            f"--only must be {' or '.join(exporter.parts)} for the format '{exporter.name}', found '{only}'"
        )
    if adapter is not None or (model and "model" in exporter.parts and only != "adapter" and convert is None):
        return
    of_models = [name for name, each in exporting.formats().items() if "model" in each.parts]
    raise PeftcoreError(
        f"no adapter is given. Pass its folder; a model alone (--model) can be exported to {' and '.join(of_models)}"
    )


def _tokenizer(base: str, adapter: Path | None, task: AdapterTask) -> tuple[Any, str | None]:
    """Return the tokenizer and a chat template that replaces its own; training may save both with the adapter."""
    from peftcore_cli.bases import adapter_folders, models
    from peftcore_cli.tasks import registered

    tokenizer = registered.find(task.task).load_processor(base, adapter)
    saved = adapter is not None and adapter_folders.has_tokenizer(adapter)
    if not base.endswith(".gguf") or (saved and tokenizer.get_vocab() != models.load_tokenizer(base).get_vocab()):
        return tokenizer, task.chat_template
    return base, task.chat_template or (tokenizer.chat_template if saved else None)


def _default_folder(adapter: Path | None, model: str, format: str) -> Path:
    """Return `run/gguf` for the adapter of a run, otherwise a folder next to what is exported."""
    if adapter is None:
        return Path(f"{Path(model).name.removesuffix('.gguf')}-{format}")
    return adapter.with_name(format) if adapter.name == "adapter" else adapter.with_name(f"{adapter.name}-{format}")


def _new(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PeftcoreError(f"'{folder}' exists already. Pass a new folder: --output FOLDER")
    return folder


@contextmanager
def complete_or_removed(folder: Path, paths: list[Path]) -> Iterator[None]:
    """Remove what the block wrote to `folder`, which was new or empty, if an error ends it, and nothing else.

    Args:
        folder: the folder.
        paths: the files and folders that the block has begun to write. Names that continue theirs with a dot are of
            files that go with them.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in list(folder.iterdir()) if folder.is_dir() else ():
            if any(f"{each.name}.".startswith(f"{path.name}.") for path in paths):
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        for each in new:
            with suppress(OSError):  # it was not made, or another process wrote to it
                each.rmdir()
        raise


def _converted(model: PreTrainedModel, rank: int | None) -> str:
    """Return the name of the adapter to write: the model's adapter, or a low-rank approximation of it."""
    import peftcore

    names = [each.name for each in peftcore.summary(model).adapters]
    if len(names) != 1:
        raise PeftcoreError(f"the folder contains the adapters {', '.join(names)}. Pass the folder of one of them")
    (name,) = names
    if rank is None:
        return name
    method = next(key for key, each in peftcore.methods().items() if each.low_rank is not None)
    kept = peftcore.convert(model, name, method=method, r=rank, adapter="converted")
    say(f"rank {rank} keeps at least {min(kept.values()):.1%} of the adapter's change in every layer")
    return "converted"
