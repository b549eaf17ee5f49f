"""Adaption prompts (LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199, section 3.2): trained vectors in attention.

    q     the queries of the layer's attention, rotated as in the layer      P [n, hidden], trained, one per layer
    S   = softmax(q (W_k P)ᵀ / sqrt(d))         without positions: P comes before all tokens
    y   = attention(x) + W_o (g · S W_v P)      g trained, zero at the start, so the start is the base

The prompts have a separate softmax and are in the upper layers. W_q, W_k, W_v and W_o are the layer's. For GPT-2,
g · S W_v P is added without W_o, as in PEFT. The multimodal variant of the paper is not supported, as in PEFT.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Division,
    Method,
    PeftRules,
    Placement,
    StateRules,
    division_of,
    hookimpl,
    ranks,
    targets,
    validation,
)

peftcore_api = ">=3.5,<4"

_ROTARY, _FUSED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"c_attn", "c_proj"}
_IN_PEFT = ("llama", "mistral", "gpt2")


@dataclass(frozen=True)
class AdaptionPromptConfig:
    """Config with the field names of Hugging Face PEFT's `AdaptionPromptConfig`, which has no defaults.

    Args:
        target_modules: name of the attention modules. None: the name in the model's family.
        adapter_len: n.
        adapter_layers: number of uppermost layers with prompts; None: all. The paper leaves out the lowest two.
        modules_to_save: modules that are also trained, in full. None: a classifier's head.
    """

    target_modules: str | None = None
    adapter_len: int = 10
    adapter_layers: int | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(adapter_len=self.adapter_len)
        if self.adapter_layers is not None:
            validation.positive_whole(adapter_layers=self.adapter_layers)

    def resolved(self, model: nn.Module, architecture: Architecture) -> AdaptionPromptConfig:
        """Return the config with the attention's name and the number of layers made explicit."""
        found = attentions(model, self.target_modules)
        name = next(iter(found), "").rpartition(".")[2]
        return replace(self, target_modules=name, adapter_layers=self.adapter_layers or len(found))


def kind(module: Any) -> set[str] | None:
    """Return the form of an attention module, `_ROTARY` or `_FUSED`, or None if the formula does not cover it."""
    inside = dict(targets.base_modules(module))
    layers = {
        name for name, child in inside.items() if name and "." not in name and any(True for _ in child.parameters())
    }
    scale = getattr(module, "scaling", None)
    d = getattr(module, "head_dim", None)
    if not isinstance(d, int) or (isinstance(scale, float) and abs(scale * d**0.5 - 1) > 1e-6) or module._parameters:
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None or getattr(module, "is_cross_attention", False):
        return None
    if layers == _ROTARY and rotation(module) is not None and module.o_proj.bias is None:
        return _ROTARY
    # GPTBigCode's layers have the same names and another order inside; with a quantized base the classes are equal.
    conv1d = any(hasattr(sys.modules[cls.__module__], "Conv1D") for cls in type(module).__mro__)
    return _FUSED if layers == _FUSED and conv1d else None


def rotation(module: Any) -> Callable[..., Any] | None:
    """Return the family's `apply_rotary_pos_emb(q, k, cos, sin)`, or None."""
    cls: Any
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if found is not None:
            takes = list(inspect.signature(found).parameters)[:4] == ["q", "k", "cos", "sin"]
            return found if takes and "position_embeddings" in inspect.signature(cls.forward).parameters else None
    return None


def attentions(model: nn.Module, name: str | None) -> dict[str, Any]:
    """Return the attention modules by path, in the order of the layers."""
    modules = dict(targets.base_modules(model))
    found = {p: m for p, m in modules.items() if (kind(m) if name is None else p.endswith(f".{name}"))}
    odd = [path for path, module in found.items() if kind(module) is None]
    there = f"'{odd[0]}' ({type(modules[odd[0]]).__name__}) differs" if odd else f"{type(model).__name__} has none"
    validation.require(
        bool(found) and not odd,
        "adaption prompts are for attention as in Llama, Mistral, Qwen2, Gemma and GPT-2: queries, keys and values of "
        f"the layer's linear layers alone, scaled by 1 / sqrt(head_dim); {there}. Use prefix-tuning or LoRA",
    )
    return found


def heads_division(path: str, attention: Any) -> Division | None:
    """Return how tensor parallelism divides the heads of an attention module, or None if it does not.

    Raises:
        PeftcoreError: not by whole heads, or not all four layers.
    """
    if not ranks.has_divided(attention):
        return None
    layers = {name: getattr(attention, name, None) for name in sorted(_ROTARY)}
    found = {name: None if layer is None else division_of(layer) for name, layer in layers.items()}
    last = found.pop("o_proj")
    validation.require(
        last is not None
        and last.by_rows
        and last.input_in_parts
        and all(
            each is not None and each.output_in_parts and each.outputs // attention.head_dim % each.mesh.size() == 0
            for each in found.values()
        ),
        f"tensor parallelism divides '{path}' over the ranks otherwise than by whole heads, an equal number for each, "
        "as adaption prompts need it. Load the model without tp_plan, apply, and call peftcore.shard(model)",
    )
    return found["q_proj"]


class AdaptionPrompt(Adapter):
    """Prompt P `[1, n, hidden]` and gate g `[1]` of an attention module; hidden states `[batch, tokens, hidden]`.

    Args:
        division: how the ranks divide the attention's heads, if they do.
    """

    def __init__(
        self,
        config: AdaptionPromptConfig,
        width: int,
        rotate: Callable[..., Any] | None,
        division: Division | None = None,
    ) -> None:
        super().__init__()
        self.division = division
        self.adaption_prompt = nn.Parameter(torch.randn(1, config.adapter_len, width))
        self.adaption_gate = nn.Parameter(torch.zeros(1))
        self.rotate = rotate

    def forward(self, base: Base, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, rest = base(hidden_states, *args, **kwargs), []
        if isinstance(output, tuple):
            output, *rest = output
        attention, p, gate = base.module, self.adaption_prompt.to(hidden_states.dtype), self.adaption_gate.float()
        if self.division is not None:
            gate = self.division.shared(gate)  # each rank uses it for its heads
        if self.rotate is None:
            parts = attention.c_attn(hidden_states).chunk(3, -1)[0], *attention.c_attn(p).chunk(3, -1)[1:]
        else:
            parts = attention.q_proj(hidden_states), attention.k_proj(p), attention.v_proj(p)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        if self.rotate is not None:
            cos, sin = args[0] if args else kwargs["position_embeddings"]
            q, _ = self.rotate(q, q[:, :1], cos, sin)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1, dtype=torch.float32)
        read = ((gate * weights).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        y = output + (read if self.rotate is None else attention.o_proj(read))
        return (y, *rest) if rest else y


def place(model: nn.Module, config: AdaptionPromptConfig, architecture: Architecture) -> list[Placement]:
    found = list(attentions(model, config.target_modules).items())
    count = config.adapter_layers or len(found)
    there = f"adapter_layers={count}, and the model has {len(found)}. Choose fewer, or None for all"
    validation.require(count <= len(found), there)
    placed: list[Placement] = []
    for path, module in found[-count:]:
        rotary = kind(module) is _ROTARY
        width, _ = targets.sizes(module.k_proj if rotary else module.c_attn)
        rotate = rotation(module) if rotary else None
        placed.append(Around(path, AdaptionPrompt(config, width, rotate, heads_division(path, module))))
    return placed


def unreadable(model: Any, paths: Sequence[str]) -> Sequence[str]:
    """Return the modules that PEFT cannot read: all, unless the model is of one of its three families."""
    return () if getattr(model.config, "model_type", None) in _IN_PEFT else paths


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="ADAPTION_PROMPT", peft=PeftRules(own_fields=frozenset({"modules_to_save"}), unreadable=unreadable)
    )
    return [Method("adaption-prompt", AdaptionPromptConfig, place, rules, learning_rate=1e-2)]
