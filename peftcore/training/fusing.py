"""`fuse`: switch to fused operators for norms, gated MLPs, activations, dropout and attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar, get_args

from torch import nn

from peftcore.engine.adaptation.adapted import is_adapted
from peftcore.engine.adaptation.fused_attention import calls_attention, replace_entry
from peftcore.engine.adaptation.fused_forward import (
    FUSED_ATTENTION,
    FUSED_FORWARD,
    FusedMLP,
    RecomputedLayerNorm,
    fuse_module,
    is_fused,
    is_outermost,
    separate,
)
from peftcore.engine.state import check_model
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.training.fusible import fused_forward

M = TypeVar("M", bound=nn.Module)
Recompute = Literal["auto", "none"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)


def fuse(model: M, *, enabled: bool = True, recompute: Recompute = "auto") -> M:
    """Compute each RMSNorm, gated MLP, activation, dropout and attention by one fused operator.

    For the backward pass, the operators for norms and gates save only their inputs, which needs less activation memory
    and fewer passes over it. Modules are selected by a table of class names (`peftcore/training/fusible.py`), and each
    is fused only if it matches the operator's values and gradients on random input. Weights, `state_dict()`, hooks and
    adapters are not affected, and adapters can be applied before or after. Results in fp32 agree within rounding; in 16
    bits at most 1 % of the values differ, by one unit in the last place.

    With `recompute="auto"`, adapted layers do not save their inputs if these are outputs of norms (including
    LayerNorm), activations or gated products: the backward pass recomputes each output once. Gradients are bit-for-bit
    the same. Inside gradient checkpointing and other saved-tensor hooks nothing changes.

    Attention is fused in transformers models with `attn_implementation="sdpa"` on CPUs with AVX2 or NEON
    (`ops.attention`), where it is faster than PyTorch: several times in 16 bits, and in fp32 without gradients from 16
    queries on. Its rounding errors are as large as PyTorch's. A model loaded by `torch.load` in another process uses
    PyTorch's attention until `fuse` is called there.

    Fused dropout, in `nn.Dropout` and attention, draws a seed from PyTorch's generator and recomputes its mask from the
    seed in the backward pass. With the same manual seed it drops other elements than PyTorch.

    On GPUs, RMSNorm and gated MLPs are fused if Triton is installed. The original forward runs where the operators are
    not supported: everything else on GPUs, and all modules under `torch.compile` and `torch.func`.

    Args:
        model: any model.
        enabled: False restores the original modules.
        recompute: `auto` recomputes cheap outputs; `none` saves all outputs.

    Returns:
        The model.

    Raises:
        PeftcoreError: `recompute` is unknown.

    Examples:
        >>> peftcore.fuse(model)                        # before or after `apply`
        >>> peftcore.fuse(model, enabled=False)         # restores the original forward
    """
    check_model(model)
    if recompute not in RECOMPUTE:
        raise PeftcoreError(f"recompute must be one of {', '.join(RECOMPUTE)}, found {recompute!r}")
    computed_by_mlp = set[int]()  # ids of activations
    for _, module in base_modules(model):
        module.__dict__.pop(FUSED_ATTENTION, None)
        if is_fused(module) and is_outermost(module):
            separate(module)
        if not enabled:
            continue
        if calls_attention(module) and replace_entry():
            module.__dict__[FUSED_ATTENTION] = True
            continue
        is_plain = is_outermost(module) and not is_fused(module) and not is_adapted(module)
        if is_plain and id(module) not in computed_by_mlp:
            _fuse(module, recompute, computed_by_mlp)
    return model


def _fuse(module: nn.Module, recompute: Recompute, computed_by_mlp: set[int]) -> None:
    forward = fused_forward(module)
    if forward is None or (isinstance(forward, RecomputedLayerNorm) and recompute == "none"):
        return
    fuse_module(module, replace(forward, recompute=recompute == "auto"))
    if isinstance(forward, FusedMLP):
        computed_by_mlp.add(id(module._modules[forward.act]))


def recomputes(model: nn.Module) -> Recompute:
    """Return the option `recompute` that a model was fused with."""
    for _, module in base_modules(model):
        if is_fused(module) and not module.__dict__[FUSED_FORWARD].recompute:
            return "none"
    return "auto"
