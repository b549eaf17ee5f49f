"""Write a model and its tokenizer as a GGUF file that llama.cpp runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.ops import PackedWeight
from peftcore.plugin import PeftcoreError, base_tensors, warn
from peftcore_gguf import k_quants
from peftcore_gguf.blocks import Blocks, as_blocks, is_exact, packed_weights
from peftcore_gguf.file import Entry, write_tensors, writing
from peftcore_gguf.hyperparameters import write_hyperparameters
from peftcore_gguf.tensor_names import Names
from peftcore_gguf.tokenizer import write_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # types the package `gguf` quantizes to
FEW_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")  # llama.cpp, too, keeps the head in 8 bits for these
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
ROUTER = ".ffn_gate_inp.weight"  # its logits choose experts


@dataclass(frozen=True)
class GgufOptions:
    """Options of `peftcore.export(..., format="gguf")` for a model; an adapter has none.

    Args:
        tokenizer: a transformers tokenizer, or the path of a GGUF file that has one. A model needs it.
        gguf_type: type of the matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with llama-cpp-python also
            q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m or q2_k. The latter need temporary disk space for an
            unquantized file. With 4 and 5 bits the head has 8. Vectors and routers of experts are fp32. Matrices whose
            rows do not divide into blocks are f16. Weights of the model in mxfp4 and affine4 keep their codes whatever
            the type, as blocks of MXFP4, Q4_0 or Q4_1.
        chat_template: chat template in place of the tokenizer's.
    """

    tokenizer: Any = None
    gguf_type: str = "f16"
    chat_template: str | None = None


def write_model(model: nn.Module, path: Path, options: GgufOptions) -> None:
    """Write the file, with the model's current weights.

    Raises:
        PeftcoreError: llama.cpp would compute something else.
    """
    if options.tokenizer is None:
        raise PeftcoreError("a model in GGUF contains its tokenizer. Pass export(..., tokenizer=tokenizer)")
    gguf_type = options.gguf_type.lower()
    packed = packed_weights(model)
    if gguf_type in k_quants.FILE_TYPES:
        if packed:
            raise PeftcoreError(
                f"gguf_type='{gguf_type}' is made from dense weights, and '{next(iter(packed))}' is in 4 bits. Call "
                "peftcore.dequantize(model) first, or choose f16, which keeps the codes of 4-bit weights"
            )
        k_quants.library(gguf_type)
        whole = path.with_name(f"{path.name}.whole")
        try:
            write_model(model, whole, replace(options, gguf_type=_unrounded(model)))
            k_quants.quantize(whole, path, gguf_type)
        finally:
            whole.unlink(missing_ok=True)
        return
    if gguf_type not in TYPES:
        raise PeftcoreError(f"gguf_type='{gguf_type}' is not known. Known: {', '.join([*TYPES, *k_quants.FILE_TYPES])}")
    names = Names(model)
    tensors = _tensors(model, names, packed)
    blocks = _block_entries(names, packed)
    with writing(path, names.family.architecture) as writer:
        import gguf

        rows = len(tensors[EMBEDDING])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_file_type(gguf_type, blocks))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = {**write_hyperparameters(writer, model, rows), **tensors}
        write_tokenizer(writer, options.tokenizer, rows, options.chat_template)
        head = HEAD if HEAD in tensors else EMBEDDING  # a tied embedding is also the head
        dense = [Entry(name, each, _type_of(name, each, gguf_type, name == head)) for name, each in tensors.items()]
        write_tensors(writer, [*dense, *blocks])


def _block_entries(names: Names, packed: Mapping[str, PackedWeight]) -> list[Entry]:
    """Return entries of the 4-bit weights, whose blocks are made one after the other when they are written."""
    entries, rounded = [], []
    for name, weight in packed.items():
        blocks = as_blocks(weight, name)
        if not is_exact(blocks):
            rounded.append(name)
        for key, shaped in names.stored(name, torch.empty(blocks.shape, dtype=torch.uint8, device="meta")).items():

            def make(name: str = name, blocks: Blocks = blocks, key: str = key) -> Tensor:
                return names.stored(name, blocks.encoded())[key]

            entries.append(Entry(key, shaped, blocks.kind, make))
    if rounded:
        warn(
            f"scales, or zero points times scales, of {len(rounded)} matrices ('{rounded[0]}') are rounded to fp16, "
            "which is what blocks of GGUF have. The 4-bit codes are kept",
        )
    return entries


def _tensors(model: nn.Module, names: Names, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """Return all dense tensors by their names in the file, with rows in its order; shared tensors appear once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in base_tensors(model).items():
        if name in packed:
            continue
        if not tensor.is_floating_point():
            raise PeftcoreError(f"'{name}' has dtype {tensor.dtype}. Call peftcore.dequantize(model) first")
        if id(tensor) not in seen:
            found.update(names.stored(name, tensor))
            seen.add(id(tensor))
    return found


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


def _file_type(gguf_type: str, blocks: list[Entry]) -> Any:
    import gguf

    if blocks:
        counts = Counter(entry.kind.name for entry in blocks)
        gguf_type = counts.most_common(1)[0][0].replace("MXFP4", "MXFP4_MOE")  # the file type's name, also without MoE
    return gguf.LlamaFileType["ALL_F32" if gguf_type == "f32" else f"MOSTLY_{gguf_type.upper()}"]
