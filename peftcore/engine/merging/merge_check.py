"""Check a merged weight against its adapters, by running both on random input in float32.

    chain(x; W)  =  forward(x; merged W)        within 1e-4 of each output feature's largest value

One check covers all adapters and layers, without a list: an adapter that changes a bias, two adapters that do not
commute, a subclass that scales, clips or normalises. The module is not changed: a shallow copy runs in evaluation mode,
without hooks, with its own float32 parameters.

This module also observes whether an embedding is a plain lookup, since there are many classes of embeddings.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from peftcore.engine.adaptation import adapted
from peftcore.engine.adaptation.tensor_parallel import division_of
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import CHILD, base_modules, original_class, original_forward
from peftcore.model.experts import experts_layout
from peftcore.plugin.layers import is_linear, is_wrapped, shape_of, sizes

TOLERANCE = 1e-4
TOLERANCE_TF32 = 4e-3  # dtypes that float32 products may round their factors to
_ROWS = 4
_LARGE = 1000.0  # scale of half of the inputs, for layers that clip


def refuse_inexact(
    path: str, module: nn.Module, names: Sequence[str], base: nn.Module, merged: nn.Module, changed: Iterable[str]
) -> None:
    """Raise a PeftcoreError unless `merged` and `base` with its adapters give the same outputs.

    Args:
        path: path of the module.
        module: the original of the evaluated copies `base` and `merged`. Must not run under autocast.
        names: the adapters, in order of activation.
        base: copy with the original parameters.
        merged: copy with the merged parameters.
        changed: names of the parameters that differ.
    """

    def refuse(reason: str) -> PeftcoreError:
        kind = original_class(module).__name__
        return PeftcoreError(
            f"merging {list(names)} into '{path}' ({kind}) would change the model's output: {reason}. Nothing was "
            "changed. Keep the adapters unmerged, or train them without this module (exclude_modules)"
        )

    if adapted.has_forward_of_instance(module) and division_of(module) is None:
        raise refuse("the module has its own `forward` on the instance, which may use the weight in any way")
    with torch.no_grad():
        tensors = list(filter(Tensor.is_floating_point, [_tensor(merged, name) for name in changed]))
        if not tensors:
            return
        adapted.activate(base, names)
        tolerance = _rounding(tensors[0].device)
        for tensor in tensors:
            tolerance = max(tolerance, 4 * torch.finfo(tensor.dtype).eps)
        forward = original_forward(module)
        inputs, expected = _first_that_runs(_inputs(module, tensors[0]), partial(forward, merged))
        if inputs is None:
            if all(adapted.changes_at(module, name) for name in names):
                return  # the adapted forward must read the same parameters as the plain one
            raise refuse("the module rejects all example inputs, so its outputs cannot be compared")
        try:
            output = type(base).forward(base, *inputs)
        except Exception as error:
            raise refuse(
                f"the adapters fail on inputs of shape {[list(x.shape) for x in inputs]} ({error!r})"
            ) from error
        output, expected = _floating(output), _floating(expected)
        for y, z in itertools.zip_longest(output, expected):
            if y is None or z is None or y.shape != z.shape:
                raise refuse("the adapters change the shape of the output")
            error_size = _difference(y, z, module)
            if not error_size <= tolerance:
                raise refuse(f"on random input, an output feature differs by {error_size:.2g} times its largest value")


def own_output(module: nn.Module, *inputs: Tensor, weight: Tensor | None = None) -> Any:
    """Return the output of the class's forward in evaluation mode; None if it rejects the inputs.

    Args:
        module: the module.
        weight: used in place of the module's weight.
    """
    device = cast(Tensor, module.weight).device
    autocast = torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else None
    with torch.no_grad(), autocast or nullcontext(), torch.random.fork_rng(devices=[]):
        copy, forward = evaluated(module, floats=None), original_forward(module)
        if weight is not None:
            copy.__dict__["_parameters"]["weight"] = weight
        return _first_that_runs(iter([inputs]), lambda *args: forward(copy, *args))[1]


def evaluated(
    module: nn.Module, floats: torch.dtype | None = torch.float32, *, adapters: bool = True, is_root: bool = True
) -> nn.Module:
    """Return a shallow copy of `module` in evaluation mode, without hooks, with floating tensors cast to `floats`.

    The caller builds the chain of the copy by `adapted.activate`; this function builds the chains of submodules.

    Args:
        module: the module.
        floats: dtype of floating-point tensors; None keeps each tensor's dtype.
        adapters: also copy the adapters attached to the module itself.
        is_root: whether `module` is the outermost one that is copied.
    """
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__, training=False, _compiled_call_impl=None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        copy.__dict__[hooks] = OrderedDict()
    for kind in ("_parameters", "_buffers"):
        copy.__dict__[kind] = tensors = dict(module.__dict__[kind])
        for name, tensor in tensors.items():
            if tensor is None or floats is None or not tensor.is_floating_point():
                continue
            if type(tensor) in (nn.Parameter, Tensor) or not is_wrapped(tensor):
                tensors[name] = tensor.detach().to(floats)
    copy.__dict__["_modules"] = modules = dict(module._modules)
    for name, child in module._modules.items():
        if child is not None and (adapters or name != CHILD):
            modules[name] = evaluated(child, floats, is_root=False)
    adapted.rebind(copy, builds=not is_root)
    return copy


def put(copy: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of an evaluated copy."""
    path, _, attribute = name.rpartition(".")
    owner = copy.get_submodule(path)
    owner.__dict__["_parameters" if attribute in owner._parameters else "_buffers"][attribute] = tensor


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(path), attribute))


def _rounding(device: torch.device) -> float:
    # torch.get_float32_matmul_precision() warns in PyTorch 2.9 and ignores the settings of a single backend.
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at import
    exact = device.type == "cpu" and matmul.fp32_precision in ("none", "ieee")
    return TOLERANCE if exact else TOLERANCE_TF32


def _inputs(module: nn.Module, weight: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs that a module of this kind may take, the most likely first."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, device="cpu").to(weight.device)
        return torch.cat([x, _LARGE * x])

    if isinstance(module, nn.Embedding):
        ids = torch.randint(module.num_embeddings, (16 * _ROWS,), generator=generator, device="cpu").tolist()
        token_ids = [i for i in vars(module).values() if type(i) is int and 0 <= i < module.num_embeddings]
        yield (torch.tensor([ids + token_ids], device=weight.device),)  # the module may treat some tokens specially
    elif is_linear(module):
        width = sizes(module)[0]
        yield (normal(_ROWS, width),)
        yield (normal(1, _ROWS, width),)
        yield (normal(16 * _ROWS, width),)  # grouped convolutions
    elif isinstance(module, _ConvNd):
        spatial = [d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        x = normal(1, module.in_channels, *spatial)
        yield (x,)
        yield (x.transpose(1, 2),)  # channels last, as in some heads
    elif isinstance(module, nn.MultiheadAttention):
        yield tuple(normal(2, 3, width)[:2] for width in (module.embed_dim, module.kdim, module.vdim))
    elif (layout := experts_layout(module)) is not None:
        x = normal(_ROWS, shape_of(module, layout.up)[1 if layout.transposed else 2])
        routing = torch.rand(_ROWS, layout.count, generator=generator, device="cpu").topk(min(2, layout.count))
        yield x, *(t.to(weight.device).repeat(2, 1) for t in (routing.indices, routing.values))
    elif weight.dim():
        width = weight.shape[-1]
        yield (normal(_ROWS, width),)
        yield (normal(_ROWS, width, 3),)
        yield (normal(_ROWS, width, 3, 3),)


def _first_that_runs(
    candidates: Iterator[tuple[Tensor, ...]], call: Callable[..., Any]
) -> tuple[tuple[Tensor, ...] | None, Any]:
    for inputs in candidates:
        try:
            return inputs, call(*inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
            continue
    return None, None


def _floating(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output."""
    if isinstance(output, Tensor):
        return [output.float().reshape(output.shape or (1,))] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [tensor for part in output for tensor in _floating(part)]


def _difference(output: Tensor, expected: Tensor, module: nn.Module) -> float:
    """Return the largest difference of two outputs, relative to the largest value of the feature.

    The first half of the rows has small inputs and the second half large ones; the halves are compared separately.
    """
    if isinstance(module, _ConvNd):
        output, expected = output.movedim(1, -1), expected.movedim(1, -1)
    # Equal infinities count as equal: their difference would be NaN.
    error_size = torch.where(output == expected, 0.0, output - expected).abs()
    size = torch.maximum(output.abs(), expected.abs()).nan_to_num(posinf=0.0)
    return max(map(_relative, error_size.chunk(2), size.chunk(2)), default=0.0)


def _relative(error_size: Tensor, size: Tensor) -> float:
    if not error_size.numel():
        return 0.0
    error_size, size = error_size.reshape(-1, error_size.shape[-1]).amax(0), size.reshape(-1, size.shape[-1]).amax(0)
    return (error_size / size.clamp(min=1e-3 * size.max().item() + 1e-30)).nan_to_num(nan=torch.inf).max().item()


def embed_scale(module: nn.Embedding) -> Tensor | float:
    """Return the factor that an embedding multiplies its output by, in the dtype of the product; 1.0 by default."""
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return 1.0
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


def odd_embedding(path: str, module: nn.Module) -> str | None:
    """Return an error message if a method cannot adapt this embedding as PEFT does, or None."""
    if not isinstance(module, nn.Embedding):
        return None
    kind, scale = original_class(module).__name__, embed_scale(module)
    if not looks_up(module):
        reason = "does more than look up its input"
    elif isinstance(scale, Tensor) or scale != 1:
        reason = "multiplies its output by embed_scale, which PEFT does not apply to the adapter's output"
    else:
        return None
    return f"'{path}' ({kind}) {reason}, so this method cannot adapt it. Exclude it: exclude_modules=['{path}']"


def looks_up(module: nn.Embedding) -> bool:
    """Return whether the module returns rows of its weight times `embed_scale`."""
    if module.max_norm is not None or len(list(base_modules(module))) > 1:
        return False
    if original_class(module).forward is nn.Embedding.forward or module.weight.is_meta:
        return True
    tokens = torch.arange(module.num_embeddings, device=module.weight.device)[None, -3:]
    output = own_output(module, tokens)
    expected = F.embedding(tokens, module.weight.detach()) * embed_scale(module)
    is_same = isinstance(output, Tensor) and output.shape == expected.shape
    return is_same and torch.allclose(output.float(), expected.float(), rtol=0.02, atol=1e-6)
