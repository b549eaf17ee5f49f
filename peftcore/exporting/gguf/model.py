"""A model's weights as they stand, with its tokenizer, as a GGUF file that llama.cpp runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.engine.trained import base_tensors
from peftcore.errors import PeftcoreError
from peftcore.exporting.gguf import k_quants
from peftcore.exporting.gguf.file import Entry, write_tensors, writing
from peftcore.exporting.gguf.hyperparameters import write_hyperparameters
from peftcore.exporting.gguf.tensor_names import Names
from peftcore.exporting.gguf.tokenizer import write_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # those that the package `gguf` quantizes to
FEW_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")  # of which llama.cpp, too, keeps the head in more
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
ROUTER = ".ffn_gate_inp.weight"  # whose logits choose experts


def write_model(
    model: nn.Module, path: Path, *, tokenizer: Any, kind: str = "f16", template: str | None = None
) -> Path:
    """Write the file.

    Args:
        tokenizer: of transformers, or the path of a GGUF file that has it.
        kind: of matrices, one of `TYPES`, or of `k_quants.FILE_TYPES`, for which the disk holds the model in its own
            type as well, for a while; with 4 and 5 bits the head has 8. Vectors are in fp32, and so is, in 16, a
            matrix whose rows are no multiple of 32. Routers of experts are in fp32, too.
        template: of chats, in place of the tokenizer's own.

    Raises:
        PeftcoreError: adapters act beside the weights, or llama.cpp would compute something else.
    """
    kind = kind.lower()
    if kind in k_quants.FILE_TYPES:
        k_quants.library(kind)
        whole = path.with_name(f"{path.name}.whole")
        try:
            write_model(model, whole, tokenizer=tokenizer, kind=_unrounded(model), template=template)
            k_quants.quantize(whole, path, kind)
        finally:
            whole.unlink(missing_ok=True)
        return path
    if kind not in TYPES:
        raise PeftcoreError(
            f"the type '{kind}' is not written here. Known: {', '.join([*TYPES, *k_quants.FILE_TYPES])}"
        )
    _refuse_unmerged(model)
    names = Names(model)
    tensors = _tensors(model, names)
    with writing(path, names.family.architecture) as writer:
        import gguf

        rows = len(tensors[EMBEDDING])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = {**write_hyperparameters(writer, model, rows), **tensors}
        write_tokenizer(writer, tokenizer, rows, template)
        head = HEAD if HEAD in tensors else EMBEDDING  # which, tied, is the head as well
        write_tensors(
            writer, [Entry(name, each, _kind(name, each, kind, name == head)) for name, each in tensors.items()]
        )
    return path


def _tensors(model: nn.Module, names: Names) -> dict[str, Tensor]:
    """All tensors by their names in the file, rows in its order; one that two names share in the model, once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in base_tensors(model).items():
        if not tensor.is_floating_point():
            raise PeftcoreError(f"'{name}' is kept as {tensor.dtype}. First: peftcore.dequantize(model)")
        if id(tensor) not in seen:
            found.update(names.stored(name, tensor))
            seen.add(id(tensor))
    return found


def _refuse_unmerged(model: nn.Module) -> None:
    ranks.refuse_sharded(model, "export")
    state = engine.state_of(model)
    if state is not None and state.active:
        raise PeftcoreError(
            f"the adapters {', '.join(map(repr, state.active))} act beside the weights, which are written without. "
            "Merge them first: peftcore.merge(model), or let them rest: peftcore.activate(model, [])"
        )


def _unrounded(model: nn.Module) -> str:
    """The type that holds all of the model's numbers."""
    kinds = {each.dtype for each in base_tensors(model).values()}
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(kinds.pop(), "f32") if len(kinds) == 1 else "f32"


def _kind(name: str, tensor: Tensor, kind: str, head: bool) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or name.endswith(ROUTER):
        return kinds.F32
    found = kinds.Q8_0 if head and kind in FEW_BITS else kinds[kind.upper()]
    return kinds.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[found][0] else found


def _file_type(kind: str) -> Any:
    import gguf

    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
