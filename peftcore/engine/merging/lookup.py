"""What an embedding does besides the lookup, observed on the layer because there are many classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.engine.merging import probe
from peftcore.model.base_modules import base_modules, original_class


def embed_scale(module: nn.Embedding) -> Tensor | float:
    """Return the factor of an embedding's output, in the dtype that the layer multiplies in."""
    scale = getattr(module, "embed_scale", None)
    return 1.0 if scale is None else scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


def odd_embedding(path: str, module: nn.Module) -> str | None:
    """Return the error message for an embedding that a method cannot adapt like PEFT, or None."""
    if not isinstance(module, nn.Embedding):
        return None
    kind, scale = original_class(module).__name__, embed_scale(module)
    if not looks_up(module):
        why = "does more than look up its input"
    elif isinstance(scale, Tensor) or scale != 1:
        why = "multiplies its output by embed_scale, which PEFT does not apply to the adapter's output"
    else:
        return None
    return f"'{path}' ({kind}) {why}, so this method cannot adapt it. Exclude it: exclude_modules=['{path}']"


def looks_up(module: nn.Embedding) -> bool:
    """Return whether the module's output is rows of its weight times `embed_scale`."""
    if module.max_norm is not None or len(list(base_modules(module))) > 1:
        return False
    if original_class(module).forward is nn.Embedding.forward or module.weight.is_meta:
        return True
    tokens = torch.arange(module.num_embeddings, device=module.weight.device)[None, -3:]
    found = probe.own_output(module, tokens)
    wanted = F.embedding(tokens, module.weight.detach()) * embed_scale(module)
    is_same = isinstance(found, Tensor) and found.shape == wanted.shape
    return is_same and torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=1e-6)
