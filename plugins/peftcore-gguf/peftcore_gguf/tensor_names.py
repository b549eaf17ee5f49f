"""Names of a model's tensors in llama.cpp's files, and the order of their rows.

Source: llama.cpp's conversion/llama.py, qwen.py and gemma.py. The rotary embedding of its `llama` rotates adjacent
dimensions of a head; transformers rotates dimensions that are half a head apart. So rows of q and k are permuted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.plugin import PeftcoreError, original_class

ALTERNATIVE = (
    "Run llama.cpp's convert_hf_to_gguf.py, which supports more models, on the output of `peftcore merge` or "
    "save_pretrained"
)


class Family(NamedTuple):
    """An architecture in llama.cpp."""

    architecture: str
    rotates_neighbours: bool = False  # the rotary embedding rotates adjacent dimensions
    activation: str = "silu"
    norms_add_one: bool = False  # norms multiply by weight + 1; the file stores weight + 1
    full_attention_interval: int = 0  # every n-th layer has full attention, all other layers a sliding window
    experts: bool = False


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "LlamaForCausalLM": Family("llama", rotates_neighbours=True),
    "MistralForCausalLM": Family("llama", rotates_neighbours=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", experts=True),
    "Gemma2ForCausalLM": Family("gemma2", activation=GELU, norms_add_one=True, full_attention_interval=2),
    "Gemma3ForCausalLM": Family("gemma3", activation=GELU, norms_add_one=True, full_attention_interval=6),
}


def family_of(model: nn.Module) -> Family:
    """Return the model's family.

    Raises:
        PeftcoreError: the model's class is not supported.
    """
    name = original_class(model).__name__
    if name not in FAMILIES:
        raise PeftcoreError(f"{name} cannot be exported to GGUF (supported: {', '.join(FAMILIES)}). {ALTERNATIVE}")
    return FAMILIES[name]


class Names:
    """Names and row order of a model's tensors in llama.cpp's files."""

    def __init__(self, model: nn.Module) -> None:
        import gguf

        self.family = family_of(model)
        config: Any = model.config
        self.heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.architecture)
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def disk_name(self, name: str) -> str:
        """Return the file's name of a parameter, such as `model.layers.0.self_attn.q_proj.weight`.

        Raises:
            PeftcoreError: llama.cpp's architecture does not have the parameter.
        """
        disk_name = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if disk_name is None:
            raise PeftcoreError(
                f"'{name}' has no counterpart in a GGUF file of '{self.family.architecture}'. {ALTERNATIVE}"
            )
        return disk_name

    def disk_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return {name in the file: tensor} for one parameter."""
        if name.endswith(".experts.gate_up_proj"):  # [experts, gate rows then up rows, in]
            module_prefix = name.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            return {
                self.disk_name(f"{module_prefix}gate_proj.weight"): gate,
                self.disk_name(f"{module_prefix}up_proj.weight"): up,
            }
        if name.endswith(".experts.down_proj"):
            return {self.disk_name(f"{name}.weight"): tensor}
        if self.family.norms_add_one and name.endswith("norm.weight"):
            return {self.disk_name(name): tensor.float() + 1}
        return {self.disk_name(name): self.rows(name.rpartition(".")[0], tensor)}

    def rows(self, path: str, tensor: Tensor) -> Tensor:
        """Return a tensor `[rows, ...]` of the module at `path` in the file's row order."""
        heads = self.heads.get(path.rpartition(".")[2])
        if heads is None or not self.family.rotates_neighbours:
            return tensor
        order = torch.arange(len(tensor)).view(heads, 2, -1).transpose(1, 2).flatten()
        return tensor[order.to(tensor.device)]
