"""Write a model and its tokenizer as a GGUF file that llama.cpp runs."""

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

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # types the package `gguf` quantizes to
FEW_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")  # llama.cpp, too, keeps the head in 8 bits for these
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
ROUTER = ".ffn_gate_inp.weight"  # its logits choose experts


def write_model(
    model: nn.Module, path: Path, *, tokenizer: Any, gguf_type: str = "f16", template: str | None = None
) -> Path:
    """Write the file.

    Args:
        model: the model, with no active adapters.
        path: the file.
        tokenizer: a transformers tokenizer, or the path of a GGUF file that has one.
        gguf_type: type of the matrices, one of `TYPES` or `k_quants.FILE_TYPES`; the latter need temporary disk space
            for an unquantized file. With 4 and 5 bits the head has 8. Vectors and routers of experts are fp32. Matrices
            whose rows do not divide into blocks are f16.
        template: chat template in place of the tokenizer's.

    Raises:
        PeftcoreError: adapters are active and not merged, or llama.cpp would compute something else.
    """
    gguf_type = gguf_type.lower()
    if gguf_type in k_quants.FILE_TYPES:
        k_quants.library(gguf_type)
        whole = path.with_name(f"{path.name}.whole")
        try:
            write_model(model, whole, tokenizer=tokenizer, gguf_type=_unrounded(model), template=template)
            k_quants.quantize(whole, path, gguf_type)
        finally:
            whole.unlink(missing_ok=True)
        return path
    if gguf_type not in TYPES:
        raise PeftcoreError(f"gguf_type='{gguf_type}' is not known. Known: {', '.join([*TYPES, *k_quants.FILE_TYPES])}")
    _refuse_unmerged(model)
    names = Names(model)
    tensors = _tensors(model, names)
    with writing(path, names.family.architecture) as writer:
        import gguf

        rows = len(tensors[EMBEDDING])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_file_type(gguf_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = {**write_hyperparameters(writer, model, rows), **tensors}
        write_tokenizer(writer, tokenizer, rows, template)
        head = HEAD if HEAD in tensors else EMBEDDING  # a tied embedding is also the head
        write_tensors(
            writer, [Entry(name, each, _type_of(name, each, gguf_type, name == head)) for name, each in tensors.items()]
        )
    return path


def _tensors(model: nn.Module, names: Names) -> dict[str, Tensor]:
    """Return all tensors by their names in the file, with rows in its order; shared tensors appear once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in base_tensors(model).items():
        if not tensor.is_floating_point():
            raise PeftcoreError(f"'{name}' has dtype {tensor.dtype}. Call peftcore.dequantize(model) first")
        if id(tensor) not in seen:
            found.update(names.stored(name, tensor))
            seen.add(id(tensor))
    return found


def _refuse_unmerged(model: nn.Module) -> None:
    ranks.refuse_sharded(model, "export")
    state = engine.state_of(model)
    if state is not None and state.active:
        raise PeftcoreError(
            f"adapters {', '.join(map(repr, state.active))} are active and would be missing from the file. Merge them "
            "with peftcore.merge(model), or deactivate them with peftcore.activate(model, [])"
        )


def _unrounded(model: nn.Module) -> str:
    """Return a type that represents the model's parameters exactly."""
    kinds = {each.dtype for each in base_tensors(model).values()}
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(kinds.pop(), "f32") if len(kinds) == 1 else "f32"


def _type_of(name: str, tensor: Tensor, gguf_type: str, head: bool) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or name.endswith(ROUTER):
        return kinds.F32
    found = kinds.Q8_0 if head and gguf_type in FEW_BITS else kinds[gguf_type.upper()]
    return kinds.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[found][0] else found


def _file_type(gguf_type: str) -> Any:
    import gguf

    return gguf.LlamaFileType["ALL_F32" if gguf_type == "f32" else f"MOSTLY_{gguf_type.upper()}"]
