"""The switch of fused operators: modules of a model that are recognized by what they compute, and attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from peftcore.adaptation.adapted import is_adapted
from peftcore.adaptation.base_modules import base_modules
from peftcore.adaptation.fused_attention import AttentionFormula, calls_attention, replace_in_table
from peftcore.adaptation.fused_forward import (
    FORMULA,
    ActivationFormula,
    DropoutFormula,
    Formula,
    GateFormula,
    LayerNormFormula,
    NormFormula,
    fuse_module,
    is_fused,
    is_outermost,
    separate,
)
from peftcore.engine.state import check_model
from peftcore.errors import PeftcoreError
from peftcore.observation.formulas import (
    activation_formula,
    dropout_formula,
    gate_formula,
    kind,
    layer_norm_formula,
    norm_formula,
)

M = TypeVar("M", bound=nn.Module)
_NAMES = {
    NormFormula: "RMSNorm",
    LayerNormFormula: "LayerNorm",
    GateFormula: "gated MLP",
    ActivationFormula: "activation",
    DropoutFormula: "dropout",
    AttentionFormula: "attention",
}
Recompute = Literal["auto", "none"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)
_MOST_KINDS = 256
_found: dict[Any, Formula | None] = {}


def fuse(model: M, *, enabled: bool = True, recompute: Recompute = "auto") -> M:
    """Compute each RMSNorm, activation, dropout, and attention by one operator with its own gradient.

    The operators for norms and gates keep only their inputs for the gradient: fewer activations, and fewer passes over
    memory. Modules are recognized by what they compute, whatever their class; all others stay as they are. Weights,
    `state_dict()`, hooks and adapters are not affected, and adapters can be applied before or after. In fp32 results
    agree within its rounding; in 16 bits at most one value in a thousand differs, by one unit in the last place.

    With `recompute="auto"`, adapted layers do not keep the outputs of norms (LayerNorm, too), activations and gated
    products that they are given: the backward pass computes them again, once for all layers that read them. Gradients
    are the same bit for bit. Within gradient checkpointing and other hooks for kept tensors nothing changes.

    Attention is that of modules that call PyTorch's `scaled_dot_product_attention`, on CPUs with AVX2 or NEON
    (`ops.attention`), where PyTorch's takes longer, in 16 bits several times: with gradients of any module, without
    gradients of those that reach it through transformers' table of attention functions, as in `generate` (in fp32 from
    16 queries on). Its errors are as large as those of PyTorch's.

    Dropout, of `nn.Dropout` and of attention, draws a seed from PyTorch's generator and computes its mask from it, also
    for the gradient: the same seed drops other elements than PyTorch's operators do.

    The model's own forward computes what the operators do not: on GPUs, under `torch.compile` and `torch.func`.

    Args:
        model: any model.
        enabled: False restores the modules' classes.
        recompute: `auto` computes again what is cheap; `none` keeps everything.

    Returns:
        The model.

    Raises:
        PeftcoreError: `recompute` is unknown.
    """
    check_model(model)
    if recompute not in RECOMPUTE:
        raise PeftcoreError(f"recompute must be one of {', '.join(RECOMPUTE)}, found {recompute!r}")
    within = set[int]()  # activations that a gated MLP computes
    for _, module in base_modules(model):
        if is_fused(module) and is_outermost(module):
            separate(module)
        if not enabled or is_fused(module) or is_adapted(module) or not is_outermost(module):
            continue
        if calls_attention(module):
            fuse_module(module, AttentionFormula())
            replace_in_table()
            continue
        formula = None if id(module) in within else _formula(module)
        if isinstance(formula, LayerNormFormula) and recompute == "none":
            continue
        if formula is not None:
            fuse_module(module, replace(formula, recompute=recompute == "auto"))
        if isinstance(formula, GateFormula):
            within.add(id(module._modules[formula.act]))
    return model


def fused_modules(model: nn.Module) -> dict[str, int]:
    """Return how many modules of each kind are fused. The forward of adapted ones is their own."""
    fused = (module for _, module in base_modules(model) if is_fused(module) and not is_adapted(module))
    formulas = (module.__dict__[FORMULA] for module in fused)
    kinds = Counter(_NAMES[type(each)] for each in formulas)
    return dict(sorted(kinds.items()))


def recomputes(model: nn.Module) -> Recompute:
    """Return how a model was fused: whether outputs are computed again that are cheap to make."""
    kept = any(is_fused(module) and not module.__dict__[FORMULA].recompute for _, module in base_modules(model))
    return "none" if kept else "auto"


def _formula(module: nn.Module) -> Formula | None:
    """Return how one operator computes `module`, remembered for all modules of the same code and settings."""
    key = kind(module)
    try:
        if key not in _found:
            if len(_found) >= _MOST_KINDS:
                _found.clear()
            _found[key] = _shown(module)
        return _found[key]
    except TypeError:  # a setting that cannot be hashed
        return _shown(module)


def _shown(module: nn.Module) -> Formula | None:
    for find in (norm_formula, layer_norm_formula, gate_formula, dropout_formula, activation_formula):
        formula = find(module)
        if formula is not None:
            return formula
    return None
