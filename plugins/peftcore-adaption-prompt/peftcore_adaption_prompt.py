"""Adaption prompts (LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199, section 3.2): attention to trained vectors.

    q     queries of the layer's attention, with its rotary embedding     P [n, hidden], one per layer, trained
    S   = softmax(q (W_k P)ᵀ / sqrt(d))         no mask and no positions: all tokens attend to all of P
    y   = attention(x) + W_o (g · S W_v P)      g is trained and starts at zero, so the start is the base model

W_q, W_k, W_v and W_o are the layer's. Only the upper layers have prompts. For GPT-2, g · S W_v P is added without W_o,
as in PEFT. Like PEFT, peftcore does not have the paper's multimodal variant.
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
        target_modules: name of the attention modules. None: found in the model.
        adapter_len: n.
        adapter_layers: number of upper layers with prompts. None: all. The paper leaves out the lowest two.
        modules_to_save: modules to train in full as well. None means a classifier's head.
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
        """Return the config with target_modules and adapter_layers filled in from the model."""
        modules = attentions(model, self.target_modules)
        name = next(iter(modules), "").rpartition(".")[2]
        return replace(self, target_modules=name, adapter_layers=self.adapter_layers or len(modules))


def attention_kind(module: Any) -> set[str] | None:
    """Return the kind of an attention module, `_ROTARY` or `_FUSED`, or None if the formula does not cover it."""
    children = {name: child for name, child in targets.base_modules(module) if name and "." not in name}
    layers = {name for name, child in children.items() if any(True for _ in child.parameters())}
    scale = getattr(module, "scaling", None)
    d = getattr(module, "head_dim", None)
    if not isinstance(d, int) or (isinstance(scale, float) and abs(scale * d**0.5 - 1) > 1e-6) or module._parameters:
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None or getattr(module, "is_cross_attention", False):
        return None
    if layers == _ROTARY and rotation(module) is not None and module.o_proj.bias is None:
        return _ROTARY
    # GPTBigCode's layers have the same names but order their outputs differently. Quantization replaces Conv1D and
    # Linear by the same class, so the test looks at what the model's own file imports.
    conv1d = any(hasattr(sys.modules[cls.__module__], "Conv1D") for cls in type(module).__mro__)
    return _FUSED if layers == _FUSED and conv1d else None


def rotation(module: Any) -> Callable[..., Any] | None:
    """Return the family's `apply_rotary_pos_emb(q, k, cos, sin)`, or None."""
    cls: Any
    for cls in type(module).__mro__:
        rotate = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if rotate is not None:
            takes = list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]
            return rotate if takes and "position_embeddings" in inspect.signature(cls.forward).parameters else None
    return None


def attentions(model: nn.Module, name: str | None) -> dict[str, Any]:
    """Return the attention modules by path, in the order of the layers."""
    modules = dict(targets.base_modules(model))
    if name is None:
        selected = {path: module for path, module in modules.items() if attention_kind(module)}
    else:
        selected = {path: module for path, module in modules.items() if path.endswith(f".{name}")}
    unsupported = [path for path, module in selected.items() if attention_kind(module) is None]
    reason = f"{type(model).__name__} has none"
    if unsupported:
        reason = f"'{unsupported[0]}' ({type(modules[unsupported[0]]).__name__}) differs"
    validation.require(
        bool(selected) and not unsupported,
        "adaption prompts need attention as in Llama, Mistral, Qwen2, Gemma and GPT-2, where queries, keys and values "
        "come straight from linear layers and scores are scaled by 1 / sqrt(head_dim); "
        f"{reason}. Use prefix-tuning or LoRA",
    )
    return selected


def heads_division(path: str, attention: Any) -> Division | None:
    """Return how tensor parallelism shards the heads of an attention module, or None if it does not.

    Raises:
        PeftcoreError: a head is split over ranks, or one of the four layers is not sharded.
    """
    if not ranks.has_divided(attention):
        return None
    layers = {name: getattr(attention, name, None) for name in sorted(_ROTARY)}
    divisions = {name: None if layer is None else division_of(layer) for name, layer in layers.items()}
    output = divisions.pop("o_proj")

    def has_whole_heads(division: Division | None) -> bool:
        if division is None or not division.output_in_parts:
            return False
        return division.outputs // attention.head_dim % division.mesh.size() == 0

    output_fits = output is not None and output.by_rows and output.input_in_parts
    validation.require(
        output_fits and all(map(has_whole_heads, divisions.values())),
        f"adaption prompts need the same number of whole heads on each rank, but tensor parallelism shards '{path}' "
        "differently. Load the model without tp_plan, apply, and call peftcore.shard(model)",
    )
    return divisions["q_proj"]


class AdaptionPrompt(Adapter):
    """Prompt P `[1, n, hidden]` and gate g `[1]` of an attention module; hidden states `[batch, tokens, hidden]`.

    Args:
        rotate: the model's rotary embedding, or None.
        division: how tensor parallelism shards the attention's heads, or None.
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
        output, extras = base(hidden_states, *args, **kwargs), []
        if isinstance(output, tuple):
            output, *extras = output
        attention, p, gate = base.module, self.adaption_prompt.to(hidden_states.dtype), self.adaption_gate.float()
        if self.division is not None:
            gate = self.division.shared(gate)  # each rank applies it to its own heads, so gradients are summed
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
        prompt_output = ((gate * weights).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        y = output + (prompt_output if self.rotate is None else attention.o_proj(prompt_output))
        return (y, *extras) if extras else y


def place(model: nn.Module, config: AdaptionPromptConfig, architecture: Architecture) -> list[Placement]:
    layers = list(attentions(model, config.target_modules).items())
    count = config.adapter_layers or len(layers)
    message = f"adapter_layers={count}, but the model has {len(layers)}. Choose fewer, or None for all"
    validation.require(count <= len(layers), message)
    placements: list[Placement] = []
    for path, module in layers[-count:]:
        rotary = attention_kind(module) is _ROTARY
        width, _ = targets.sizes(module.k_proj if rotary else module.c_attn)
        rotate = rotation(module) if rotary else None
        placements.append(Around(path, AdaptionPrompt(config, width, rotate, heads_division(path, module))))
    return placements


def unreadable(model: Any, paths: Sequence[str]) -> Sequence[str]:
    """Return the paths that PEFT cannot load: all of them, unless the model is Llama, Mistral or GPT-2."""
    return () if getattr(model.config, "model_type", None) in _IN_PEFT else paths


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="ADAPTION_PROMPT", peft=PeftRules(own_fields=frozenset({"modules_to_save"}), unreadable=unreadable)
    )
    return [Method("adaption-prompt", AdaptionPromptConfig, place, rules, learning_rate=1e-2)]
