"""What llama.cpp calls a model's tensors, and in which order it has the rows of them.

Facts from llama.cpp's conversion/llama.py, qwen.py and gemma.py: its `llama` turns neighbouring dimensions of a head
(rotary embedding), transformers' turn those that lie half a head apart; so rows of q and k change places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.adaptation.class_swap import original_class
from peftcore.errors import PeftcoreError

WAY_ROUND = (
    "llama.cpp's own convert_hf_to_gguf.py reads more: give it the folder of `peftcore merge`, or of save_pretrained"
)


class Family(NamedTuple):
    """A kind of model as llama.cpp knows it."""

    architecture: str
    neighbours: bool = False  # its rotary embedding turns neighbouring dimensions
    activation: str = "silu"
    norms_from_one: bool = False  # norms multiply by one more than their weight, and by what the file has
    all_seen_every: int = 0  # so many layers one attends to all, the others within a sliding window
    experts: bool = False


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "LlamaForCausalLM": Family("llama", neighbours=True),
    "MistralForCausalLM": Family("llama", neighbours=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", experts=True),
    "Gemma2ForCausalLM": Family("gemma2", activation=GELU, norms_from_one=True, all_seen_every=2),
    "Gemma3ForCausalLM": Family("gemma3", activation=GELU, norms_from_one=True, all_seen_every=6),
}


def family_of(model: nn.Module) -> Family:
    """Raises a PeftcoreError for a model that is none of those."""
    name = original_class(model).__name__
    if name not in FAMILIES:
        raise PeftcoreError(f"{name} is not written as GGUF here, which knows {', '.join(FAMILIES)}. {WAY_ROUND}")
    return FAMILIES[name]


class Names:
    """Names and rows in llama.cpp's files of a model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        import gguf

        self.family = family_of(model)
        config: Any = model.config
        self.heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.architecture)
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def of(self, name: str) -> str:
        """The name of a parameter, `model.layers.0.self_attn.q_proj.weight`, in the file."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PeftcoreError(f"'{name}' has no place in a GGUF file of '{self.family.architecture}'. {WAY_ROUND}")
        return found

    def stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the file has of a parameter, by its names there."""
        if name.endswith(".experts.gate_up_proj"):  # [experts, gates and then the others, in]
            place = name.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            return {self.of(f"{place}gate_proj.weight"): gate, self.of(f"{place}up_proj.weight"): up}
        if name.endswith(".experts.down_proj"):
            return {self.of(f"{name}.weight"): tensor}
        if self.family.norms_from_one and name.endswith("norm.weight"):
            return {self.of(name): tensor.float() + 1}
        return {self.of(name): self.rows(name.rpartition(".")[0], tensor)}

    def rows(self, path: str, tensor: Tensor) -> Tensor:
        """The rows of what belongs to the module at `path`, `[rows, ...]`, in the file's order."""
        heads = self.heads.get(path.rpartition(".")[2])
        if heads is None or not self.family.neighbours:
            return tensor
        order = torch.arange(len(tensor)).view(heads, 2, -1).transpose(1, 2).flatten()
        return tensor[order.to(tensor.device)]
