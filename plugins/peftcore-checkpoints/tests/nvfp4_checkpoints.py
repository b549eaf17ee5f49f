"""Writers of NVFP4 weights as ModelOpt and llm-compressor store them, by their documented layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from int4_checkpoints import LINEAR
from safetensors.torch import load_file, save_file
from torch import Tensor

ENTRIES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Values(NamedTuple):
    """codes `[out, in]` from 0 to 15, scales in E4M3 `[out, in / 16]`, and the scale of the whole weight."""

    codes: Tensor
    scales: Tensor
    whole: Tensor

    def dense(self, tool: str) -> Tensor:
        """The weight in fp32, each step rounded, as the tool computes it."""
        scales = self.scales.float() * self.whole if tool == "modelopt" else self.scales.float() / self.whole
        entries = torch.cat([ENTRIES, -ENTRIES])[self.codes.long()]
        return entries * scales.repeat_interleave(16, 1)


def values(rows: int, columns: int, tool: str, seed: int = 0) -> Values:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(rows, columns // 16, generator=draw) * 400 + 20).to(torch.float8_e4m3fn)
    whole = torch.rand((), generator=draw) * 1e-4 + 5e-5
    return Values(codes, scales, whole if tool == "modelopt" else 1 / whole)


def tensors(weight_values: Values, tool: str, has_inputs: bool = True) -> dict[str, Tensor]:
    packed = weight_values.codes[:, ::2] | weight_values.codes[:, 1::2] << 4
    inputs = torch.tensor(0.01)
    if tool == "modelopt":
        result = {"weight": packed, "weight_scale": weight_values.scales, "weight_scale_2": weight_values.whole}
        return result | ({"input_scale": inputs} if has_inputs else {})
    result = {
        "weight_packed": packed,
        "weight_scale": weight_values.scales,
        "weight_global_scale": weight_values.whole.reshape(1),
    }
    return result | ({"input_global_scale": 1 / inputs.reshape(1)} if has_inputs else {})


def config(tool: str, **changes: Any) -> dict[str, Any]:
    """The model's `quantization_config`, of weights alone."""
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    if tool == "modelopt":
        group = {"input_activations": weights, "weights": weights, "targets": ["Linear"]}
        own = {"quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
        return {"quant_method": "modelopt", "config_groups": {"group_0": group}, **own, **changes}
    scheme = {"weights": {**weights, "strategy": "tensor_group", "symmetric": True}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**scheme, "targets": ["Linear"], **changes.pop("scheme", {})}},
        **changes,
    }


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a dense checkpoint with experts as layers, which is how the tools see them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        if not path.endswith("experts") or tensor.ndim != 3:
            found[name] = tensor
            continue
        for i, expert in enumerate(tensor):
            parts = {"gate_proj": expert.chunk(2)[0], "up_proj": expert.chunk(2)[1]}
            parts = parts if last == "gate_up_proj" else {last: expert}
            found |= {f"{path}.{i}.{part}.weight": weight.contiguous() for part, weight in parts.items()}
    return found


def write_folder(
    model: Any, folder: Path, tool: str, settings: dict[str, Any] | None, keep: str = "?", one_scale: bool = False
) -> dict[str, Tensor]:
    """Save the model with its linear layers but the head replaced by random NVFP4 ones; return their dense weights.

    Args:
        settings: the `quantization_config`; None to write ModelOpt's separate file only.
        keep: part of the names of layers that stay dense.
        one_scale: all weights have the same whole scale.
    """
    model.save_pretrained(folder)
    state, dense = load_file(folder / "model.safetensors"), {}
    state = apart(state) if model.config.model_type.startswith("gemma4") else state
    for seed, name in enumerate([name for name in state if name.endswith(LINEAR) and keep not in name]):
        found = values(*state.pop(name).shape, tool, seed)
        found = found._replace(whole=values(1, 16, tool).whole) if one_scale else found
        dense[name] = found.dense(tool)
        stem = name.removesuffix("weight")
        state |= {f"{stem}{part}": t.contiguous() for part, t in tensors(found, tool).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    if settings is None:
        details = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head*"],
        }
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": details}))
    else:
        own["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(own))
    return dense
