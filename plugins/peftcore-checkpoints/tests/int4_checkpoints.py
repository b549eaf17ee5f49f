"""Writers of int4 weights as GPTQ, AutoAWQ and compressed-tensors store them, by their documented layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = NDArray[np.int64]
LINEAR = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")  # the latter are Mixtral's experts
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Values(NamedTuple):
    """codes `[out, in]` and zeros `[out, groups]` from 0 to 15, scales `[out, groups]`, the group of each input."""

    codes: Array
    zeros: Array
    scales: Tensor
    group_of: Array

    def dense(self) -> Tensor:
        scales = self.scales.double().numpy()[:, self.group_of]
        return torch.from_numpy(scales * (self.codes - self.zeros[:, self.group_of]))


def values(
    rows: int,
    columns: int,
    group: int,
    *,
    seed: int = 0,
    symmetric: bool = False,
    act_order: bool = False,
    smallest: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Values:
    """Random ones; zeros from `smallest` on."""
    random = np.random.default_rng(seed)
    groups = columns // group
    zeros = np.full((rows, groups), 8) if symmetric else random.integers(smallest, 16, (rows, groups))
    scales = torch.from_numpy(random.uniform(0.01, 0.03, (rows, groups))).to(dtype)
    group_of = np.arange(columns) // group
    return Values(
        random.integers(0, 16, (rows, columns)), zeros, scales, random.permutation(group_of) if act_order else group_of
    )


def words(codes: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """[.., n / 8] of [.., n]: place k of a word has value order[k] of its eight."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    return sum(eights[..., value] << 4 * place for place, value in enumerate(order))  # type: ignore[return-value]


def int32(weight_values: Array) -> Tensor:
    return torch.from_numpy((weight_values % (1 << 32)).astype(np.uint32).view(np.int32).copy())


def gptq(weight_values: Values, *, version: int = 1, act_order: bool = False) -> dict[str, Tensor]:
    zeros = words(weight_values.zeros.T)
    tensors = {
        "qweight": int32(words(weight_values.codes).T),
        "qzeros": int32(zeros - 0x11111111 if version == 1 else zeros),
        "scales": weight_values.scales.T.contiguous(),
    }
    return tensors | ({"g_idx": torch.from_numpy(weight_values.group_of).int()} if act_order or version == 2 else {})


def awq(weight_values: Values) -> dict[str, Tensor]:
    return {
        "qweight": int32(words(weight_values.codes.T, AWQ_ORDER)),
        "qzeros": int32(words(weight_values.zeros.T, AWQ_ORDER)),
        "scales": weight_values.scales.T.contiguous(),
    }


def compressed(weight_values: Values, *, symmetric: bool = False, act_order: bool = False) -> dict[str, Tensor]:
    rows, columns = weight_values.codes.shape
    padded = np.pad(weight_values.codes, ((0, 0), (0, -columns % 8)), constant_values=0)
    tensors = {
        "weight_packed": int32(words(padded)),
        "weight_scale": weight_values.scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = int32(words(np.pad(weight_values.zeros.T, ((0, 0), (0, -rows % 8)))).T)
    return tensors | ({"weight_g_idx": torch.from_numpy(weight_values.group_of).int()} if act_order else {})


def config(kind: str, group: int, **changes: Any) -> dict[str, Any]:
    """The model's `quantization_config`."""
    if kind == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False, "desc_act": False, **changes}
    if kind == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            **changes,
        }
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    scheme = {"targets": ["Linear"], "weights": {**weights, **changes.pop("weights", {})}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**scheme, **changes.pop("scheme", {})}},
        **changes,
    }


def write_folder(
    model: Any,
    folder: Path,
    settings: Mapping[str, Any],
    write: Callable[[Values], dict[str, Tensor]],
    group: int,
    **options: Any,
) -> dict[str, Tensor]:
    """Save the model with its linear layers but the head replaced by random int4 ones; return their dense weights."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    dense = {}
    for seed, name in enumerate([name for name in state if name.endswith(LINEAR)]):
        weight_values = values(*state.pop(name).shape, group, seed=seed, **options)
        dense[name] = weight_values.dense()
        state |= {f"{name.removesuffix('weight')}{part}": t for part, t in write(weight_values).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config_fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_fields, "quantization_config": settings}))
    return dense
