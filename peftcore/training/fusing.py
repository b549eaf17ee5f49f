"""The switch of fused operators: norms, gated MLPs, activations, dropout and attention."""

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
    """Compute each RMSNorm, gated MLP, activation, dropout and attention by one operator with its own gradient.

    The operators for norms and gates save only their inputs for the gradient: fewer activations, and fewer passes over
    memory. A table of class names (`peftcore/training/fusible.py`) selects modules, and each must give the
    operator's values and gradients on random input; all others are left alone. Weights, `state_dict()`, hooks and
    adapters are not affected, and adapters can be applied before or after. In fp32 results agree within rounding; in 16
    bits at most one value in a hundred differs, by one unit in the last place.

    With `recompute="auto"`, adapted layers do not save the outputs of norms (also of LayerNorm), activations and gated
    products that they receive: the backward pass recomputes them, once for all layers that read them. Gradients are the
    same bit for bit. Within gradient checkpointing and other hooks for saved tensors nothing changes.

    Attention is that of transformers' models with `attn_implementation="sdpa"`, on CPUs with AVX2 or NEON
    (`ops.attention`), where PyTorch's takes longer, in 16 bits several times (in fp32 without gradients from 16 queries
    on). Its errors are as large as those of PyTorch's. A model that is loaded by `torch.load` in another process has
    PyTorch's attention until `fuse` is called there.

    Dropout, of `nn.Dropout` and of attention, draws a seed from PyTorch's generator and computes its mask from it, also
    for the gradient: the same seed drops other elements than PyTorch's operators do.

    The model's own forward computes what the operators do not support: on GPUs, under `torch.compile` and `torch.func`.

    Args:
        model: any model.
        enabled: False restores the modules' classes.
        recompute: `auto` recomputes what is cheap; `none` saves everything.

    Returns:
        The model.

    Raises:
        PeftcoreError: `recompute` is unknown.

    Examples:
        >>> peftcore.fuse(model)                        # before or after `apply`
        >>> peftcore.fuse(model, enabled=False)         # the modules' own forward again
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
    """Return the `recompute` with which a model was fused."""
    for _, module in base_modules(model):
        if is_fused(module) and not module.__dict__[FUSED_FORWARD].recompute:
            return "none"
    return "auto"
