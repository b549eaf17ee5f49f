"""Write a model and its tokenizer as a GGUF file for llama.cpp."""

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
from peftcore_gguf.blocks import Blocks, is_exact, pack_blocks, packed_weights
from peftcore_gguf.file import Entry, gguf_writer, write_tensors
from peftcore_gguf.hyperparameters import write_hyperparameters
from peftcore_gguf.tensor_names import Names
from peftcore_gguf.tokenizer import write_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # types that the package `gguf` can write
FEW_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")  # types whose head is kept in 8 bits, as in llama.cpp
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
ROUTER = ".ffn_gate_inp.weight"


@dataclass(frozen=True)
class GgufOptions:
    """Options of `peftcore.export(..., format="gguf")` for a model. Adapters have no options.

    Args:
        tokenizer: a transformers tokenizer, or the path of a GGUF file that has one. Required.
        gguf_type: type of the matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with llama-cpp-python also
            q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m or q2_k, which need temporary disk space for an unquantized
            file. With 4 and 5 bits the head has 8. Vectors and routers of experts are fp32. Matrices whose rows are not
            a multiple of the block size are f16. Weights in mxfp4 and affine4 always keep their codes, as blocks of
            MXFP4, Q4_0 or Q4_1.
        chat_template: chat template to write instead of the tokenizer's.
    """

    tokenizer: Any = None
    gguf_type: str = "f16"
    chat_template: str | None = None


def write_model(model: nn.Module, path: Path, options: GgufOptions) -> None:
    """Write the model with its current weights.

    Raises:
        PeftcoreError: an option is invalid, or llama.cpp would compute different outputs.
    """
    if options.tokenizer is None:
        raise PeftcoreError("a GGUF model file contains the tokenizer. Pass export(..., tokenizer=tokenizer)")
    gguf_type = options.gguf_type.lower()
    packed = packed_weights(model)
    if gguf_type in k_quants.FILE_TYPES:
        if packed:
            raise PeftcoreError(
                f"gguf_type='{gguf_type}' needs dense weights, but '{next(iter(packed))}' is in 4 bits. Call "
                "peftcore.dequantize(model) first, or choose f16, which preserves the codes of 4-bit weights"
            )
        k_quants.library(gguf_type)  # fail before the unquantized file is written
        unquantized_file = path.with_name(f"{path.name}.whole")
        try:
            write_model(model, unquantized_file, replace(options, gguf_type=_exact_type(model)))
            k_quants.quantize(unquantized_file, path, gguf_type)
        finally:
            unquantized_file.unlink(missing_ok=True)
        return
    if gguf_type not in TYPES:
        types = ", ".join([*TYPES, *k_quants.FILE_TYPES])
        raise PeftcoreError(f"gguf_type='{gguf_type}' is not known. Choose one of: {types}")
    names = Names(model)
    tensors = _dense_tensors(model, names, packed)
    blocks = _block_entries(names, packed)
    with gguf_writer(path, names.family.architecture) as writer:
        import gguf

        rows = len(tensors[EMBEDDING])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_file_type(gguf_type, blocks))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = {**write_hyperparameters(writer, model, rows), **tensors}
        write_tokenizer(writer, options.tokenizer, rows, options.chat_template)
        head = HEAD if HEAD in tensors else EMBEDDING  # a tied embedding is also the output head
        dense = [
            Entry(name, tensor, _type_of(name, tensor, gguf_type, name == head)) for name, tensor in tensors.items()
        ]
        write_tensors(writer, [*dense, *blocks])


def _block_entries(names: Names, packed: Mapping[str, PackedWeight]) -> list[Entry]:
    """Return entries for the 4-bit weights, which encode their blocks only when they are written."""
    entries, rounded_names = [], []
    for name, weight in packed.items():
        blocks = pack_blocks(weight, name)
        if not is_exact(blocks):
            rounded_names.append(name)
        for key, byte_shape in names.disk_tensors(
            name, torch.empty(blocks.shape, dtype=torch.uint8, device="meta")
        ).items():

            def make(name: str = name, blocks: Blocks = blocks, key: str = key) -> Tensor:
                return names.disk_tensors(name, blocks.encode())[key]

            entries.append(Entry(key, byte_shape, blocks.kind, make))
    if rounded_names:
        warn(
            f"the scales and zero points of {len(rounded_names)} matrices (such as '{rounded_names[0]}') are rounded "
            "to fp16, the dtype of GGUF's blocks. The 4-bit codes do not change",
        )
    return entries


def _dense_tensors(model: nn.Module, names: Names, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """Return all dense tensors with the file's names and row order. Shared tensors appear once."""
    disk_tensors: dict[str, Tensor] = {}
    seen_ids: set[int] = set()
    for name, tensor in base_tensors(model).items():
        if name in packed:
            continue
        if not tensor.is_floating_point():
            raise PeftcoreError(
                f"cannot write '{name}' ({tensor.dtype}) as GGUF. Call peftcore.dequantize(model) first"
            )
        if id(tensor) not in seen_ids:
            disk_tensors.update(names.disk_tensors(name, tensor))
            seen_ids.add(id(tensor))
    return disk_tensors


def _exact_type(model: nn.Module) -> str:
    """Return the smallest type that represents the model's parameters exactly."""
    dtypes = {tensor.dtype for tensor in base_tensors(model).values()}
    if dtypes == {torch.bfloat16}:
        return "bf16"
    return "f16" if dtypes == {torch.float16} else "f32"


def _type_of(name: str, tensor: Tensor, gguf_type: str, is_head: bool) -> Any:
    import gguf

    ggml_types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or name.endswith(ROUTER):
        return ggml_types.F32
    block_type = ggml_types.Q8_0 if is_head and gguf_type in FEW_BITS else ggml_types[gguf_type.upper()]
    return ggml_types.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[block_type][0] else block_type


def _file_type(gguf_type: str, blocks: list[Entry]) -> Any:
    import gguf

    if blocks:
        counts = Counter(entry.kind.name for entry in blocks)
        # llama.cpp calls the file type MXFP4_MOE, also for models without experts.
        gguf_type = counts.most_common(1)[0][0].replace("MXFP4", "MXFP4_MOE")
    return gguf.LlamaFileType["ALL_F32" if gguf_type == "f32" else f"MOSTLY_{gguf_type.upper()}"]
