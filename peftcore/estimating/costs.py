"""What an operator costs: floating-point operations, and memory beside its inputs and its output.

What PyTorch's libraries take inside a product is measured (`libraries`); what peftcore's operators keep is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peftcore import ops
from peftcore.estimating.libraries import OUTER, PLAIN, TRANSPOSED, Libraries
from peftcore.ops._extension import extension
from peftcore.ops.linear_4bit import PANEL_BYTES
from peftcore.ops.weight import PackedWeight

_ONEDNN_SHAPES = 1024  # whose code is kept: ONEDNN_PRIMITIVE_CACHE_CAPACITY


class Cost(NamedTuple):
    """Of one operator.

    Args:
        flops: a multiplication and an addition are two.
        narrow: of a product the least of rows, inner dimension and columns.
        thin: of them those of adapters, with the least dimension of their products.
        unpacked: values of a weight in 4 bits that are read.
        widened: a CPU multiplies by this frozen weight with `ops.dense_linear`, which is not reached on meta tensors.
        scratch: bytes that are taken and given back.
        kept: bytes that stay with the thread, of which the largest of all operators counts.
        product: (rows, inner, columns, layout) of a product that a library computes, in the type `dtype`.
        products: how many of them; those of experts are unlike one another.
    """

    flops: float = 0.0
    scratch: int = 0
    kept: int = 0
    product: tuple[int, int, int, str] | None = None
    products: int = 1
    dtype: str = ""
    narrow: int = 0
    thin: tuple[float, int] = (0.0, 0)
    unpacked: int = 0
    widened: bool = False


FREE = Cost()


def cost(operator: Any, args: tuple[Any, ...], output: Any, libraries: Libraries) -> Cost:
    """What an operator costs with these libraries."""
    name = operator._schema.name
    if name.startswith("peftcore::"):
        return _with_scratch(_ours(operator, args), libraries)
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return Cost(_attention(operator, args))
    formula = flop_registry.get(operator.overloadpacket)
    if formula is None:
        return FREE
    flops = float(formula(*args, out_val=output))
    if name in ("aten::mm", "aten::addmm"):
        left, right = args[-2:] if name == "aten::mm" else args[1:3]
        layout = OUTER if _transposed(left) else TRANSPOSED if _transposed(right) else PLAIN
        found = _product(left.shape[0], left.shape[1], right.shape[1], left.dtype, layout)
        widened = left.dtype in ops.WIDENED and layout != OUTER and not right.requires_grad
        return _with_scratch(found, libraries)._replace(flops=flops, widened=widened)
    if name in ("aten::bmm", "aten::baddbmm"):
        left, right = args[-2:] if name == "aten::bmm" else args[1:3]
        return Cost(flops, narrow=min(*left.shape[1:], right.shape[2]))
    return Cost(flops)


class Kept(NamedTuple):
    """Bytes that stay when a step is over: `allocated`, of which so many were `touched`."""

    allocated: int
    touched: int


def kept(costs: Sequence[Cost], libraries: Libraries) -> Kept:
    """What operators of these costs keep, and PyTorch's libraries with them."""
    columns = 0
    shapes: dict[str, set[tuple[int, int, int, str]]] = defaultdict(set)
    unlike: dict[str, int] = defaultdict(int)
    for each in costs:
        if each.product is None:
            continue
        if each.dtype not in libraries.code:
            columns = max(columns, each.product[2])
        elif each.products == 1:
            shapes[each.dtype].add(each.product)
        elif extension is None:  # its kernels compute experts' products
            unlike[each.dtype] += each.products
    ours = max(each.kept for each in costs)
    allocated, touched = libraries.of_columns(columns) if columns else (0, 0)
    for dtype, (code, of_it) in libraries.code.items():
        count = min(_ONEDNN_SHAPES, len(shapes[dtype]) + unlike[dtype])
        allocated, touched = allocated + count * code, touched + count * of_it
    return Kept(ours + allocated, ours + touched)


def _attention(operator: Any, args: tuple[Any, ...]) -> float:
    """Operations of attention as a CPU computes it: scores and their product with values, or their three gradients."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    query, key, value = (given[name] for name in ("query", "key", "value"))
    forward = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    causal = 0.5 if given.get("is_causal", False) else 1.0
    return forward * causal * (2.5 if "grad_out" in given else 1.0)


def _transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.shape[0] > 1


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, layout: str) -> Cost:
    """[rows, inner] times [inner, columns]."""
    narrow = min(rows, inner, columns)
    found = Cost(2.0 * rows * inner * columns, dtype=str(dtype).removeprefix("torch."), narrow=narrow)
    return found._replace(product=(rows, inner, columns, layout)) if dtype.itemsize in (2, 4) else found


def _with_scratch(found: Cost, libraries: Libraries) -> Cost:
    if found.product is None:
        return found
    rows, _, columns, layout = found.product
    return found._replace(scratch=int(rows * columns * libraries.scratch.get(f"{found.dtype} {layout}", 0.0)))


def _frozen(rows: int, weight: list[Tensor], packing: list[int], dtype: torch.dtype, backward: bool = False) -> Cost:
    """x Wᵀ, or with `backward` dy W, by panels of a weight in 4 bits."""
    out, inner = packing[-2:] if packing else weight[0].shape[-2:]
    if not packing:
        return _product(rows, out, inner, dtype, PLAIN) if backward else _product(rows, inner, out, dtype, TRANSPOSED)
    limit, row_bytes = PANEL_BYTES["backward" if backward else "forward"], inner * dtype.itemsize
    panel = out
    if out * row_bytes > limit:
        multiple = PackedWeight(weight[0], weight[1], weight[2], (out, inner), packing[0]).rows_that_begin_blocks()
        panel = min(out, max(1, limit // (row_bytes * multiple)) * multiple)
    layout = PLAIN if backward else TRANSPOSED
    found = _product(rows, *((panel, inner) if backward else (inner, panel)), dtype, layout)
    narrow = min(rows, out, inner)
    return found._replace(flops=2.0 * rows * out * inner, kept=panel * row_bytes, narrow=narrow, unpacked=out * inner)


def _ours(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Of an operator of `peftcore.ops`, by what its arguments are called there: all write them alike."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    grad = given.get("grad")
    rows_of = given.get("x") if grad is None else grad
    if operator._schema.name.startswith("peftcore::dense_linear") and rows_of is not None:
        rows, (out, inner) = rows_of[..., 0].numel(), given["weight"].shape
        return Cost(2.0 * rows * out * inner, narrow=min(rows, out, inner))
    if "packing" not in given or rows_of is None:
        return FREE
    weight, packing, needs = given["weight"], given["packing"], given.get("needs", (True, True, True))
    rows = rows_of[..., 0].numel()
    factors = [given[name] for name in ("a", "b") if name in given] or list(given.get("factors", ()))[:2]
    factors = [factor[0] if isinstance(factor, list) else factor for factor in factors]  # of samples, all of one size
    if "offsets" in given:  # each row meets one expert
        experts = given["offsets"].numel()
        out, inner = packing[-2:] if packing else weight[0].shape[-2:]
        found = _product(-(-rows // experts), inner, out, rows_of.dtype, TRANSPOSED)
        unpacked = experts * out * inner if packing else 0
        found = found._replace(flops=2.0 * rows * inner * out, products=experts, unpacked=unpacked)
        factors = [factor[0] for factor in factors]
    else:
        found = _frozen(rows, weight, packing, rows_of.dtype, backward=grad is not None)
    if not needs[0]:
        found = FREE
    again = (0, 0) if grad is None else needs[1:]
    thin = sum((1 + more) * factor.numel() for factor, more in zip(factors, again, strict=False))
    narrow = min([rows, *(min(factor.shape) for factor in factors)])
    return found._replace(flops=found.flops + 2.0 * rows * thin, thin=(2.0 * rows * thin, narrow))
