"""Cost of an operator: floating-point operations, and memory besides its inputs and its output.

The memory that PyTorch's libraries take inside a product is measured (`overhead`); what peftcore's operators keep is
known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peftcore import ops
from peftcore.estimating.overhead import OUTER, PLAIN, TRANSPOSED, Overhead
from peftcore.ops._extension import extension
from peftcore.ops.linear_4bit import PANEL_BYTES
from peftcore.ops.weight import PackedWeight


class Cost(NamedTuple):
    """Cost of one call of an operator.

    Args:
        flops: Floating-point operations; a multiplication and an addition are two.
        scratch: Bytes that are taken and given back.
        kept: Bytes that stay with the thread, which keeps the largest of all operators.
        product: (rows, inner, columns, layout) of a product that a library computes, in the type `dtype`.
        products: Number of such products; those of experts differ in their shapes.
        narrow: Smallest of a product's rows, inner dimension and columns.
        low_rank: Floating-point operations of adapters within `flops`, with the smallest dimension of their products.
        masked: Operations of causal attention beyond `flops`, on keys that a mask hides within a block.
        unpacked: Number of values of a 4-bit weight that are read.
        widened: Whether a CPU multiplies by this frozen weight with `ops.dense_linear`, which meta tensors do not
            reach.
    """

    flops: float = 0.0
    scratch: int = 0
    kept: int = 0
    product: tuple[int, int, int, str] | None = None
    products: int = 1
    dtype: str = ""
    narrow: int = 0
    low_rank: tuple[float, int] = (0.0, 0)
    masked: float = 0.0
    unpacked: int = 0
    widened: bool = False


FREE = Cost()
_BLOCKS = {"torch": 512, "ours": 64}  # keys that attention on a CPU takes together


def cost(operator: Any, args: tuple[Any, ...], output: Any, overhead: Overhead) -> Cost:
    """Return the cost of an operator on a machine with this overhead."""
    name = operator._schema.name
    if name.startswith("peftcore::attention"):
        return _attention(operator, args, _BLOCKS["ours"])
    if name.startswith("peftcore::"):
        return _with_scratch(_ours(operator, args), overhead)
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return _attention(operator, args, _BLOCKS["torch"])
    formula = flop_registry.get(operator.overloadpacket)
    if formula is None:
        return FREE
    flops = float(formula(*args, out_val=output))
    if name in ("aten::mm", "aten::addmm"):
        left, right = args[-2:] if name == "aten::mm" else args[1:3]
        layout = OUTER if _transposed(left) else TRANSPOSED if _transposed(right) else PLAIN
        found = _product(left.shape[0], left.shape[1], right.shape[1], left.dtype, layout)
        widened = left.dtype in ops.WIDENED and layout != OUTER and not right.requires_grad
        return _with_scratch(found, overhead)._replace(flops=flops, widened=widened)
    if name in ("aten::bmm", "aten::baddbmm"):
        left, right = args[-2:] if name == "aten::bmm" else args[1:3]
        return Cost(flops, narrow=min(*left.shape[1:], right.shape[2]))
    return Cost(flops)


def kept(costs: Sequence[Cost], overhead: Overhead) -> int:
    """Return the bytes that operators with these costs keep after the step."""
    shapes: dict[str, set[tuple[int, int, int, str]]] = defaultdict(set)
    unlike: dict[str, int] = defaultdict(int)
    for each in costs:
        if each.product is None:
            continue
        if each.products == 1:
            shapes[each.dtype].add(each.product)
        elif extension is None:  # with the extension, its kernels compute the products of experts
            unlike[each.dtype] += each.products
    counts = {dtype: len(shapes[dtype]) + unlike[dtype] for dtype in {*shapes, *unlike}}
    return max((each.kept for each in costs), default=0) + overhead.for_shapes(counts)


def _attention(operator: Any, args: tuple[Any, ...], block: int) -> Cost:
    """Return the cost of attention on a CPU: scores and their product with values, or the three gradients."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    query, key, value = (given[name] if name in given else given[name[0]] for name in ("query", "key", "value"))
    forward = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    whole = forward * (2.5 if "grad_out" in given or "grad" in given else 1.0)
    if not given.get("is_causal", given.get("causal", False)):
        return Cost(whole)
    blocks = -(-key.shape[-2] // block)
    return Cost(0.5 * whole, masked=whole * ((blocks + 1) / (2 * blocks) - 0.5))


def _transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.shape[0] > 1


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, layout: str) -> Cost:
    """Return the cost of [rows, inner] times [inner, columns]."""
    narrow = min(rows, inner, columns)
    found = Cost(2.0 * rows * inner * columns, dtype=str(dtype).removeprefix("torch."), narrow=narrow)
    return found._replace(product=(rows, inner, columns, layout)) if dtype.itemsize in (2, 4) else found


def _with_scratch(found: Cost, overhead: Overhead) -> Cost:
    if found.product is None:
        return found
    rows, _, columns, layout = found.product
    return found._replace(scratch=int(rows * columns * overhead.scratch.get(f"{found.dtype} {layout}", 0.0)))


def _frozen(rows: int, weight: list[Tensor], packing: list[int], dtype: torch.dtype, backward: bool = False) -> Cost:
    """Return the cost of x Wᵀ, or with `backward` of dy W, which unpacks a 4-bit weight panel by panel."""
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
    """Return the cost of an operator of `peftcore.ops`, whose arguments have the same names in all operators."""
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
    factors = [factor[0] if isinstance(factor, list) else factor for factor in factors]  # equal in all samples
    if "offsets" in given:  # each row goes to one expert
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
    gradients = (0, 0) if grad is None else needs[1:]  # a product more for each factor's own
    size = sum((1 + more) * factor.numel() for factor, more in zip(factors, gradients, strict=False))
    narrow = min([rows, *(min(factor.shape) for factor in factors)])
    return found._replace(flops=found.flops + 2.0 * rows * size, low_rank=(2.0 * rows * size, narrow))
