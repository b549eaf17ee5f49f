"""`peftcore export`: a model and an adapter as files for llama.cpp, Ollama, vLLM, SGLang, PEFT and ONNX."""

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
    "peftcore export -a run --to gguf --type q8_0",
    "peftcore export -a run --to vllm -o served",
)
TARGETS = ("gguf", "vllm", "peft", "onnx")
PARTS = ("adapter", "model")


def export(
    to: Annotated[str, typer.Option(help="gguf (llama.cpp, Ollama), vllm (and SGLang), peft, or onnx.")],
    adapter: options.MaybeAdapter = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; by default beside the adapter.")
    ] = None,
    model: options.BaseModel = None,
    kind: Annotated[
        str, typer.Option("--type", help="Of a model in gguf: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0, q6_k to q2_k.")
    ] = "f16",
    only: Annotated[str | None, typer.Option(help="Of gguf: the adapter alone, or the merged model alone.")] = None,
    convert: Annotated[
        int | None, typer.Option(metavar="RANK", help="First make thin products of this rank of what the adapter does.")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="As of `peftcore merge`.")] = False,
    quantize: options.Quantize = None,
    dtype: options.WrittenDtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Write what another program reads, or say why that would compute something else.

    gguf writes adapter.gguf, for a GGUF file of the base, and the merged model; without --adapter the base itself.
    """
    from peftcore.cli import models

    for value, known, option in ((to, TARGETS, "--to"), (only, PARTS, "--only")):
        if value is not None and value not in known:
            raise PeftcoreError(f"{option} is one of {', '.join(known)}, found '{value}'")
    if adapter is None and (model is None or to not in ("gguf", "onnx") or only == "adapter" or convert is not None):
        raise PeftcoreError("name the adapter: --adapter FOLDER. A model alone (--model) goes to gguf or onnx")
    folder = _new(output or _beside(adapter, str(model), to))
    task = models.adapter_task(adapter) if adapter else models.AdapterTask("causal-lm", 512)
    base = models.resolve(models.base_of(adapter, model) if adapter else str(model))
    loaded = models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=quantize)
    name: str | None = None
    if adapter is not None:
        models.load_adapter(loaded, adapter)
        name = _converted(loaded, convert)
    work = _Work(folder, loaded, base, name)
    if to == "gguf":
        if name is not None and only != "model":
            work.gguf_adapter(alone=only == "adapter")
        if only != "adapter":
            if name is not None:
                models.merge_adapter(loaded, untie=untie, quantize=quantize, dtype=dtype, device=device)
            work.gguf_model(kind, *_tokenizer(base, adapter, task))
    elif to == "onnx":
        work.onnx()
    else:
        work.folder_of(to)
    for line in work.said:
        say(line)


@dataclass
class _Work:
    """Files of one export; what there is to say of them comes last, when all of them are there."""

    folder: Path
    model: PreTrainedModel
    base: str
    adapter: str | None
    said: list[str] = field(default_factory=list)

    def gguf_adapter(self, alone: bool) -> None:
        """The adapter as llama.cpp reads it; where it cannot be that, the merged model is left."""
        import peftcore
        from peftcore.exporting import gguf

        gguf.family_of(self.model)  # what is refused for this has no way round
        try:
            file = peftcore.export(self.model, self.folder / "adapter.gguf", to="gguf", adapter=self.adapter)
        except PeftcoreError as error:
            if alone:
                raise
            way = "; with --convert RANK it is" if "convert" in str(error) else ""
            warn(f"{error}. No adapter.gguf is written{way}")
            return
        self._told(file, gguf.command(self.base if self.base.endswith(".gguf") else "BASE.gguf", file))

    def gguf_model(self, kind: str, tokenizer: Any, template: str | None) -> None:
        """The weights as they stand, with the tokenizer."""
        import peftcore
        from peftcore.exporting import gguf

        file = self.folder / f"model-{kind}.gguf"
        peftcore.export(self.model, file, to="gguf", tokenizer=tokenizer, kind=kind, chat_template=template)
        self._told(file, gguf.command(file))

    def onnx(self) -> None:
        """The model with its adapter beside the weights, as it stands."""
        import peftcore

        self._told(peftcore.export(self.model, self.folder / "model.onnx", to="onnx"), "")

    def folder_of(self, to: str) -> None:
        """The adapter's own folder, in PEFT's format."""
        import peftcore
        from peftcore.exporting import serving

        if to == "peft":
            peftcore.save(self.model, self.folder, adapter=self.adapter, resumable=False)
            self.said.append(f"{self.folder}: peft.PeftModel.from_pretrained(model, {str(self.folder)!r})")
            return
        peftcore.export(self.model, self.folder, to="vllm", adapter=self.adapter)
        if self.base.endswith(".gguf"):
            warn(f"vLLM and SGLang put adapters beside a model's folder or hub id, not beside '{self.base}'.")
        for remark in serving.remarks(self.folder):
            warn(remark)
        self.said += [f"{self.folder}: {command}" for command in serving.commands(self.folder, self.base)]

    def _told(self, file: Path, use: str) -> None:
        self.said.append(f"{file} ({file.stat().st_size / 1e6:.1f} MB){': ' if use else ''}{use}")


def _tokenizer(base: str, adapter: Path | None, task: AdapterTask) -> tuple[Any, str | None]:
    """The tokenizer, and a chat template in place of its own; trainers may have put theirs beside the adapter."""
    from peftcore.cli import models

    tokenizer = models.load_tokenizer(base, adapter)
    beside = adapter is not None and models.has_tokenizer(adapter)
    if not base.endswith(".gguf") or (beside and tokenizer.get_vocab() != models.load_tokenizer(base).get_vocab()):
        return tokenizer, task.chat_template
    return base, task.chat_template or (tokenizer.chat_template if beside else None)


def _beside(adapter: Path | None, model: str, to: str) -> Path:
    """`run/gguf` for the adapter of a run, else a folder beside what is exported."""
    if adapter is None:
        return Path(f"{Path(model).stem}-{to}")
    return adapter.with_name(to) if adapter.name == "adapter" else adapter.with_name(f"{adapter.name}-{to}")


def _new(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PeftcoreError(f"'{folder}' exists already. Give a new folder: --output FOLDER")
    return folder


def _converted(model: PreTrainedModel, rank: int | None) -> str:
    """The name of the adapter to be written: the one on the model, or what is made of it."""
    import peftcore
    from peftcore.registry import registry

    names = [each.name for each in peftcore.summary(model).adapters]
    if len(names) != 1:
        raise PeftcoreError(f"the folder holds the adapters {', '.join(names)}. Name the folder of one of them")
    (name,) = names
    if rank is None:
        return name
    method = next(key for key, each in registry.methods().items() if each.low_rank is not None)
    kept = peftcore.convert(model, name, method=method, r=rank, adapter="converted")
    say(f"rank {rank} keeps at least {min(kept.values()):.1%} of the adapter's change in every layer")
    return "converted"
