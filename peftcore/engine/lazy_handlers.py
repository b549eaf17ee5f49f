"""What stays lazy of lazy logits: shapes, scales, losses and log-probabilities. `lazy_tensor.py` says how.

Each handler takes the recipe and the arguments of a function, and returns None where the logits are needed.

TRL's `selective_log_softmax` and `entropy_from_logits` are made of these: in fp32 it gathers logits and subtracts
logsumexp row by row, and the latter is computed with the token that was gathered, lse = z - log p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.engine.lazy_tensor import HANDLERS, LazyLogits, Recipe, plainly
from peftcore.ops import PackedWeight


def _float(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if recipe.dtype is torch.float32:
        return args[0]
    if recipe.kind != "logits" or kwargs or len(args) > 1 or recipe.dtype not in (torch.float16, torch.bfloat16):
        return None
    return recipe.derived(Tensor.float, dtype=torch.float32)


def _to(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    given = [*rest, *kwargs.values()]
    if set(kwargs) <= {"dtype", "device", "non_blocking"} and len(rest) <= 1 and given:
        device = [torch.device(g) for g in given if isinstance(g, (str, torch.device))]
        dtypes = [g for g in given if isinstance(g, torch.dtype)]
        if any(each != recipe.rows.device for each in device) or len(device) + len(dtypes) < len(rest):
            return None
        if all(each is recipe.dtype for each in dtypes):
            return args[0]
        if dtypes == [torch.float32]:
            return _float(recipe, args[:1], {})
    return None


# --- shapes ----------------------------------------------------------------------------------------------------------


def _contiguous(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) > 1:
        return None
    return args[0] if recipe.layout.is_contiguous() else recipe.derived(Tensor.contiguous)


def _is_contiguous(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    return recipe.layout.is_contiguous(*args[1:], **kwargs)


def _stride(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    return recipe.layout.stride(*args[1:], **kwargs)


def _reshaped(function: Callable[..., Tensor]) -> Callable[[Recipe, Any, Any], Any]:
    def reshaped(recipe: Recipe, args: Any, kwargs: Any) -> Any:
        shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
        if kwargs or not all(type(size) is int for size in shape) or len(shape) == 0:
            return None
        layout = function(recipe.layout, *shape)  # or PyTorch's own error
        if layout.dim() < 2 or layout.shape[-1] != recipe.classes:
            return None
        shape = tuple(layout.shape)
        shares = layout.untyped_storage()._cdata == recipe.layout.untyped_storage()._cdata
        step: Callable[[Tensor], Tensor] = Tensor.view if shares else Tensor.reshape
        rows = recipe.rows.reshape(*shape[:-1], recipe.rows.shape[-1])
        return recipe.derived(lambda t: step(t, shape), rows, layout, shares=shares)  # type: ignore[call-arg]

    return reshaped


def _flatten(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    names = dict(zip(("start_dim", "end_dim"), args[1:], strict=False)) | kwargs
    if not set(names) <= {"start_dim", "end_dim"}:
        return None
    shape = tuple(recipe.layout.flatten(**names).shape)
    return _reshaped(Tensor.reshape)(recipe, (args[0], shape), {})


def _index(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    dimensions = recipe.layout.dim()
    consumed, tensors = 0, False
    for each in index:
        if each is Ellipsis:
            continue
        if isinstance(each, Tensor):
            if isinstance(each, LazyLogits) or each.dtype not in (torch.bool, torch.int64):
                return None
            consumed += each.dim() if each.dtype is torch.bool else 1
            tensors = tensors or each.dim() > 0 or each.dtype is torch.bool  # a number gives a view
        elif isinstance(each, (int, slice)) and not isinstance(each, bool):
            consumed += 1
        else:
            return None
    if sum(each is Ellipsis for each in index) > 1 or consumed > dimensions:
        return None
    last = index[-1] if index else slice(None)
    touches_last = consumed == dimensions or (Ellipsis in [e for e in index if e is Ellipsis] and last is not Ellipsis)
    if touches_last and not (isinstance(last, slice) and last == slice(None)):
        return None
    rows = recipe.rows[index]
    if rows.shape[-1] != recipe.rows.shape[-1]:
        return None
    if tensors:
        layout = torch.empty((*rows.shape[:-1], recipe.classes), device="meta")
    else:
        layout = recipe.layout[tuple(int(each) if isinstance(each, Tensor) else each for each in index)]
    picked = None
    if recipe.picked is not None:
        leading = index[:-1] if touches_last else index
        picked = recipe.picked[leading]
    return recipe.derived(lambda t: t[index], rows, layout, shares=not tensors, picked=picked)


def _unbind(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    """Return the parts along the first dimension, as iteration does."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if len(args) > 2 or not set(kwargs) <= {"dim"} or dim not in (0, -recipe.layout.dim()) or recipe.layout.dim() < 2:
        return None
    return tuple(_index(recipe, (args[0], i), {}) for i in range(recipe.layout.shape[0]))


def _split(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    size, dim = kwargs.get("split_size", args[1] if len(args) > 1 else None), kwargs.get("dim", (*args, 0, 0)[2])
    if len(args) > 3 or type(size) is not int or size < 1 or dim not in (0, -recipe.layout.dim()):
        return None
    return _parts(recipe, args[0], size)


def _chunk(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    chunks, dim = kwargs.get("chunks", args[1] if len(args) > 1 else None), kwargs.get("dim", (*args, 0, 0)[2])
    if len(args) > 3 or type(chunks) is not int or chunks < 1 or dim not in (0, -recipe.layout.dim()):
        return None
    return _parts(recipe, args[0], max(1, -(-recipe.layout.shape[0] // chunks)))


def _parts(recipe: Recipe, logits: LazyLogits, size: int) -> Any:
    count = recipe.layout.shape[0]
    if recipe.layout.dim() < 2 or not count:
        return None
    return tuple(_index(recipe, (logits, slice(n, min(n + size, count))), {}) for n in range(0, count, size))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _scaled(inverse: bool) -> Callable[[Recipe, Any, Any], Any]:
    def scaled(recipe: Recipe, args: Any, kwargs: Any) -> Any:
        if len(args) == 2 and isinstance(args[1], LazyLogits) and not kwargs and not inverse:
            return _product(*args)
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float) or recipe.kind != "logits" or not args[1]:
            return None
        by = args[1]
        factor = 1 / by if inverse else float(by)
        if factor <= 0 and recipe.cap is not None:
            return None
        cap = None if recipe.cap is None else recipe.cap * factor
        step = (lambda t: t / by) if inverse else (lambda t: t * by)
        return recipe.derived(step, scale=recipe.scale * factor, cap=cap, picked=None)

    return scaled


def _tanh(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) > 1 or recipe.cap is not None or recipe.kind != "logits":
        return None
    return recipe.derived(torch.tanh, cap=1.0, picked=None)


def _log_softmax(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    known = set(kwargs) <= {"dim", "dtype", "_stacklevel"} and len(rest) <= 1
    dim, dtype = kwargs.get("dim", rest[0] if rest else None), kwargs.get("dtype")
    if not known or recipe.kind != "logits" or not _last(recipe, dim) or dtype not in (None, torch.float32):
        return None
    if dtype is None and torch.is_autocast_enabled(recipe.rows.device.type):
        return None
    if dtype is None:
        return recipe.derived(lambda t: F.log_softmax(t, -1), kind="logs")
    return recipe.derived(lambda t: F.log_softmax(t, -1, dtype=dtype), kind="logs", dtype=dtype)


def _exp(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) > 1 or recipe.kind != "logs" or recipe.gradients:
        return None
    return recipe.derived(torch.exp, kind="probs")


def _product(one: Any, other: Any) -> Any:
    """Return p · log p, without gradients."""
    probs, logs = (one.recipe, other.recipe) if one.recipe.kind == "probs" else (other.recipe, one.recipe)
    if probs.kind != "probs" or probs.parent is not logs or logs.gradients or not logs.stays_lazy():
        return None
    return logs.derived(lambda t: torch.exp(t) * t, kind="products")


def _last(recipe: Recipe, dim: Any) -> bool:
    return type(dim) is int and dim in (-1, recipe.layout.dim() - 1)


def _sum(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if recipe.kind != "products" or recipe.gradients or len(args) > 2 or not set(kwargs) <= {"dim"}:
        return None
    if not _last(recipe, dim):
        return None
    tokens = torch.zeros(recipe.layout.shape[:-1], dtype=torch.int64, device=recipe.rows.device)
    return -_log_probs(recipe, tokens)[1].to(recipe.dtype)


def _argmax(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if recipe.kind not in ("logits", "logs") or len(args) > 2 or not set(kwargs) <= {"dim"} or not _last(recipe, dim):
        return None
    recipe.head.check()
    rows = recipe.rows.detach()
    found = torch.empty(rows.shape[:-1], dtype=torch.int64, device=rows.device)
    size = ops.rows_in_piece(recipe.classes, rows.dtype, rows.device)
    with plainly(False):
        pairs = zip(rows.reshape(-1, rows.shape[-1]).split(size), found.view(-1).split(size), strict=True)
        for some, out in pairs:
            torch.argmax(recipe.apply_to(recipe.head.function(some)), -1, out=out)
    return found


# --- losses ----------------------------------------------------------------------------------------------------------


def _log_probs(recipe: Recipe, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of tokens, and entropies without gradients."""
    rows, gradients = recipe.use(), recipe.gradients
    options: dict[str, Any] = {"logit_scale": recipe.scale, "soft_cap": recipe.cap}
    with plainly(gradients):
        if recipe.head.operands is not None:
            weight, bias = recipe.head.operands
            return ops.linear_log_probs(rows, weight, tokens, bias=bias, **options)
        return ops.head_log_probs(_head(recipe), rows, tokens, ops.Settings(0.0, recipe.scale, recipe.cap or 0.0))


def _head(recipe: Recipe) -> ops.HeadFunction:
    return ops.HeadFunction(recipe.head.function, recipe.classes, recipe.head.tensors)


def _logits_of(recipe: Recipe, tokens: Tensor) -> Tensor | None:
    """Return the logit of one token of each row, in fp32 with gradients, or None if only all can be computed."""
    if recipe.head.operands is None or isinstance(recipe.head.operands[0], PackedWeight):
        return None
    rows, (weight, bias), gradients = recipe.use(), recipe.head.operands, recipe.gradients
    with plainly(gradients):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        z = (rows.to(dtype) * F.embedding(tokens, weight).to(dtype)).sum(-1)
        z = z if bias is None else z + bias[tokens].to(dtype)
        z = z * recipe.scale
        return z if recipe.cap is None else recipe.cap * torch.tanh(z / recipe.cap)


def _gather(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    names = dict(zip(("dim", "index"), rest, strict=False)) | kwargs
    dim, index = names.get("dim"), names.get("index")
    if set(names) != {"dim", "index"} or recipe.kind not in ("logits", "logs") or not _last(recipe, dim):
        return None
    if type(index) is not Tensor or index.dtype is not torch.int64 or index.shape != (*recipe.rows.shape[:-1], 1):
        return None
    if index.device != recipe.rows.device or bool(((index < 0) | (index >= recipe.classes)).any()):
        return None  # PyTorch's own error
    tokens = index[..., 0]
    if recipe.kind == "logs":
        return _log_probs(recipe, tokens)[0][..., None].to(recipe.dtype)
    if recipe.dtype not in (torch.float32, torch.float64):
        return None
    found = _logits_of(recipe, tokens)
    if found is None:
        return None
    recipe.picked = tokens
    return found[..., None].to(recipe.dtype)


def _logsumexp(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if recipe.kind != "logits" or recipe.picked is None or len(args) > 2 or not set(kwargs) <= {"dim"}:
        return None
    if not _last(recipe, dim) or recipe.picked.shape != recipe.rows.shape[:-1]:
        return None
    logit = _logits_of(recipe, recipe.picked)
    return None if logit is None else (logit - _log_probs(recipe, recipe.picked)[0]).to(recipe.dtype)


_CROSS_ENTROPY = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def _cross_entropy(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    given = dict(zip(_CROSS_ENTROPY, args[1:], strict=False)) | kwargs
    target, class_weight = given.get("target"), given.get("weight")
    if given.get("size_average") is not None or given.get("reduce") is not None or recipe.kind != "logits":
        return None
    if not isinstance(target, Tensor) or target.dtype is not torch.int64 or recipe.layout.dim() != 2:
        return None
    if target.shape != recipe.rows.shape[:-1] or target.device != recipe.rows.device:
        return None
    if class_weight is not None and (class_weight.requires_grad or class_weight.shape != (recipe.classes,)):
        return None
    if given.get("reduction", "mean") not in ("mean", "sum", "none"):
        return None
    rows, gradients = recipe.use(), recipe.gradients
    options: dict[str, Any] = {name: given[name] for name in ("ignore_index", "reduction") if name in given}
    smoothing = float(given.get("label_smoothing", 0.0))
    autocast = torch.is_autocast_enabled(recipe.rows.device.type)  # under which PyTorch computes it in fp32
    with plainly(gradients):
        if recipe.head.operands is not None:
            weight, bias = recipe.head.operands
            options |= {"logit_scale": recipe.scale, "soft_cap": recipe.cap, "label_smoothing": smoothing}
            loss = ops.linear_cross_entropy(rows, weight, target, bias=bias, class_weight=class_weight, **options)
        else:
            settings = ops.Settings(smoothing, recipe.scale, recipe.cap or 0.0)
            loss = ops.head_cross_entropy(_head(recipe), rows, target, settings, class_weight=class_weight, **options)
    return loss if autocast else loss.to(recipe.dtype)


_MORE: dict[Any, Callable[[Recipe, Any, Any], Any]] = {
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.is_contiguous: _is_contiguous,
    Tensor.stride: _stride,
    Tensor.view: _reshaped(Tensor.view),
    **dict.fromkeys((Tensor.reshape, torch.reshape), _reshaped(Tensor.reshape)),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.unbind, torch.unbind), _unbind),
    **dict.fromkeys((Tensor.split, torch.split), _split),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scaled(False)),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide), _scaled(True)),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((Tensor.exp, torch.exp), _exp),
    **dict.fromkeys((Tensor.sum, torch.sum), _sum),
    **dict.fromkeys((Tensor.argmax, torch.argmax), _argmax),
    **dict.fromkeys((Tensor.logsumexp, torch.logsumexp), _logsumexp),
    **dict.fromkeys((Tensor.gather, torch.gather), _gather),
    F.cross_entropy: _cross_entropy,
}
HANDLERS.update(_MORE)
