"""`peftcore export`: write a model and an adapter for llama.cpp, Ollama, vLLM, SGLang, PEFT, or ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.cli import options
from peftcore.cli.console import say, warn
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcore.cli.models import AdapterTask

EXAMPLES = (
    "peftcore export -a run --format gguf --gguf-type q8_0",
    "peftcore export -a run --format vllm -o served",
)
FORMATS = ("gguf", "vllm", "peft", "onnx")
PARTS = ("adapter", "model")


def export(
    format: Annotated[
        str, typer.Option(help="Format to write: gguf (llama.cpp, Ollama), vllm (and SGLang), peft, or onnx.")
    ],
    adapter: options.MaybeAdapter = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; by default next to the adapter.")
    ] = None,
    model: options.BaseModel = None,
    gguf_type: Annotated[
        str,
        typer.Option(
            help="Type of a model's matrices in gguf: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0, or q6_k to q2_k."
        ),
    ] = "f16",
    only: Annotated[
        str | None, typer.Option(help="Write one gguf file only: the adapter, or the merged model.")
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

    gguf writes adapter.gguf, for a GGUF file of the base, and the merged model; without --adapter the base itself.
    """
    from peftcore.cli import models

    for value, known, option in ((format, FORMATS, "--format"), (only, PARTS, "--only")):
        if value is not None and value not in known:
            raise PeftcoreError(f"{option} must be one of {', '.join(known)}, found '{value}'")
    if adapter is None and (
        model is None or format not in ("gguf", "onnx") or only == "adapter" or convert is not None
    ):
        raise PeftcoreError(
            "no adapter is given. Pass --adapter FOLDER; a model alone (--model) can be exported to gguf and onnx"
        )
    folder = _new(output or _default_folder(adapter, str(model), format))
    task = models.adapter_task(adapter) if adapter else models.AdapterTask("causal-lm", 512)
    base = models.resolve(models.base_of(adapter, model) if adapter else str(model))
    loaded = models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=quantize)
    name: str | None = None
    if adapter is not None:
        models.load_adapter(loaded, adapter)
        name = _converted(loaded, convert)
    work = _Work(folder, loaded, base, name)
    if format == "gguf":
        if name is not None and only != "model":
            work.gguf_adapter(required=only == "adapter")
        if only != "adapter":
            if name is not None:
                models.merge_adapter(loaded, untie=untie, quantize=quantize, dtype=dtype, device=device)
            work.gguf_model(gguf_type, *_tokenizer(base, adapter, task))
    elif format == "onnx":
        work.onnx()
    else:
        work.folder_of(format)
    for line in work.report:
        say(line)


@dataclass
class _Work:
    """Files of one export, and the report that is printed once all of them are written."""

    folder: Path
    model: PreTrainedModel
    base: str
    adapter: str | None
    report: list[str] = field(default_factory=list)

    def gguf_adapter(self, required: bool) -> None:
        """Write the adapter for llama.cpp; if that is impossible and not required, warn."""
        import peftcore
        from peftcore.exporting import gguf

        gguf.family_of(self.model)  # an unsupported family is an error for the merged model too
        try:
            file = peftcore.export(self.model, self.folder / "adapter.gguf", format="gguf", adapter=self.adapter)
        except PeftcoreError as error:
            if required:
                raise
            hint = ". --convert RANK makes it one that can be written" if "convert" in str(error) else ""
            warn(f"{error}. adapter.gguf was not written{hint}")
            return
        self._add(file, gguf.command(self.base if self.base.endswith(".gguf") else "BASE.gguf", file))

    def gguf_model(self, gguf_type: str, tokenizer: Any, template: str | None) -> None:
        """Write the model's current weights and the tokenizer."""
        import peftcore
        from peftcore.exporting import gguf

        file = self.folder / f"model-{gguf_type}.gguf"
        peftcore.export(
            self.model, file, format="gguf", tokenizer=tokenizer, gguf_type=gguf_type, chat_template=template
        )
        self._add(file, gguf.command(file))

    def onnx(self) -> None:
        """Write the model with its adapter unmerged."""
        import peftcore

        self._add(peftcore.export(self.model, self.folder / "model.onnx", format="onnx"), "")

    def folder_of(self, format: str) -> None:
        """Write the adapter's folder, in PEFT's format or for vLLM."""
        import peftcore
        from peftcore.exporting import serving

        if format == "peft":
            peftcore.save(self.model, self.folder, adapter=self.adapter, resumable=False)
            self.report.append(f"{self.folder}: peft.PeftModel.from_pretrained(model, {str(self.folder)!r})")
            return
        peftcore.export(self.model, self.folder, format="vllm", adapter=self.adapter)
        if self.base.endswith(".gguf"):
            warn(f"vLLM and SGLang need the base as a folder or hub id to load an adapter, not '{self.base}'.")
        for remark in serving.remarks(self.folder):
            warn(remark)
        self.report += [f"{self.folder}: {command}" for command in serving.commands(self.folder, self.base)]

    def _add(self, file: Path, command: str) -> None:
        self.report.append(f"{file} ({file.stat().st_size / 1e6:.1f} MB){': ' if command else ''}{command}")


def _tokenizer(base: str, adapter: Path | None, task: AdapterTask) -> tuple[Any, str | None]:
    """Return the tokenizer and a chat template that replaces its own; training may save both with the adapter."""
    from peftcore.cli import models

    tokenizer = models.load_tokenizer(base, adapter)
    saved = adapter is not None and models.has_tokenizer(adapter)
    if not base.endswith(".gguf") or (saved and tokenizer.get_vocab() != models.load_tokenizer(base).get_vocab()):
        return tokenizer, task.chat_template
    return base, task.chat_template or (tokenizer.chat_template if saved else None)


def _default_folder(adapter: Path | None, model: str, format: str) -> Path:
    """Return `run/gguf` for the adapter of a run, otherwise a folder next to what is exported."""
    if adapter is None:
        return Path(f"{Path(model).stem}-{format}")
    return adapter.with_name(format) if adapter.name == "adapter" else adapter.with_name(f"{adapter.name}-{format}")


def _new(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PeftcoreError(f"'{folder}' exists already. Pass a new folder: --output FOLDER")
    return folder


def _converted(model: PreTrainedModel, rank: int | None) -> str:
    """Return the name of the adapter to write: the model's adapter, or a low-rank approximation of it."""
    import peftcore
    from peftcore.registry import registry

    names = [each.name for each in peftcore.summary(model).adapters]
    if len(names) != 1:
        raise PeftcoreError(f"the folder contains the adapters {', '.join(names)}. Pass the folder of one of them")
    (name,) = names
    if rank is None:
        return name
    method = next(key for key, each in registry.methods().items() if each.low_rank is not None)
    kept = peftcore.convert(model, name, method=method, r=rank, adapter="converted")
    say(f"rank {rank} keeps at least {min(kept.values()):.1%} of the adapter's change in every layer")
    return "converted"
