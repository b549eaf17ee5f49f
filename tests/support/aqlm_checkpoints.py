"""Checkpoints of AQLM: random codes in the layout of the aqlm package, and their values by the formula."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYOUTS = {
    "1x16": (1, 16, 1, 8),
    "2x8": (2, 8, 1, 8),
    "blocks": (2, 6, 2, 4),
}  # codebooks, bits, outputs and inputs of a block


def stored(out: int, inputs: int, layout: str) -> dict[str, Tensor]:
    """Return random tensors of a layer, with the codes as the aqlm package packs them."""
    books, bits, out_group, in_group = LAYOUTS[layout]
    codes = torch.randint(2**bits, (out // out_group, inputs // in_group, books))
    codes[codes >= 2 ** (bits - 1)] -= 2**bits
    return {
        "codes": codes.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": torch.randn(books, 2**bits, out_group, in_group) / 4,
        "scales": torch.rand(out // out_group, 1, 1, 1) + 0.5,
    }


def by_loop(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Return the dense weight by the formula, a block at a time."""
    (rows, columns, books), (_, entries, out_group, in_group) = codes.shape, codebooks.shape
    dense = torch.empty(rows * out_group, columns * in_group)
    for i in range(rows):
        for j in range(columns):
            block = sum(codebooks[c, int(codes[i, j, c]) % entries] for c in range(books)) * scales[i, 0]
            dense[i * out_group : (i + 1) * out_group, j * in_group : (j + 1) * in_group] = block
    return dense


def write_folder(model: Any, folder: Path, layout: str = "2x8") -> dict[str, Tensor]:
    """Write a transformers model with its projections in AQLM, and return the dense state dict with their values."""
    model.save_pretrained(folder)
    state, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            state[name] = dense[name] = tensor
            continue
        parts = stored(*tensor.shape, layout)
        state |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        dense[name] = by_loop(**parts)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    keys = ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")
    skipped = {"linear_weights_not_to_quantize": ["lm_head.weight"]}
    change_config(folder, quant_method="aqlm", **dict(zip(keys, LAYOUTS[layout], strict=True)), **skipped)
    return dense


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of the `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | fields
    (folder / "config.json").write_text(json.dumps(config))
