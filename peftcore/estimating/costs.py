"""Cost of an operator: floating-point operations, and memory besides its inputs and its output.

What PyTorch's libraries take inside a product on a CPU follows two rules, measured on a Zen 5 with oneDNN 3.11: oneDNN
keeps code for each shape of a product in 16 bits, and without oneDNN PyTorch sums xᵀ w into a copy in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peftcore.ops import PackedWeight, extension
from peftcore.ops.linear_4bit import PANEL_BYTES
from peftcore.ops.processor import onednn_multiplies

PLAIN, TRANSPOSED, OUTER = "xw", "xwt", "xtw"  # layouts of products: x w, x wᵀ and xᵀ w
_HALVES = (torch.bfloat16, torch.float16)
_CODE = 550_000  # bytes that oneDNN keeps for a shape
_MOST_SHAPES = 1024  # that oneDNN keeps code for (ONEDNN_PRIMITIVE_CACHE_CAPACITY)


class Cost(NamedTuple):
    """Cost of one call of an operator.

    Args:
        flops: Floating-point operations; a multiplication and an addition are two.
        scratch: Bytes that are taken and given back.
        kept: Bytes that stay with the thread, which keeps the largest of all operators.
        product: (rows, inner, columns, layout) of a product for which oneDNN keeps code.
        products: Number of such products; those of experts differ in their shapes.
    """

    flops: float = 0.0
    scratch: int = 0
    kept: int = 0
    product: tuple[int, int, int, str] | None = None
    products: int = 1


FREE = Cost()


def cost(operator: Any, args: tuple[Any, ...], output: Any, *, on_card: bool) -> Cost:
    """Return the cost of an operator. On a card libraries take nothing that is known."""
    name = operator._schema.name
    if name.startswith("peftcore::"):
        found = _ours(operator, args)
        return Cost(found.flops) if on_card else found
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return _attention(operator, args)
    formula = flop_registry.get(operator.overloadpacket)
    if formula is None:
        return FREE
    flops = float(formula(*args, out_val=output))
    if on_card or name not in ("aten::mm", "aten::addmm"):
        return Cost(flops)
    left, right = args[-2:] if name == "aten::mm" else args[1:3]
    layout = OUTER if _transposed(left) else TRANSPOSED if _transposed(right) else PLAIN
    return _product(left.shape[0], left.shape[1], right.shape[1], left.dtype, layout)._replace(flops=flops)


def kept(costs: Sequence[Cost]) -> int:
    """Return the bytes that operators with these costs keep after the step."""
    shapes: set[tuple[int, int, int, str]] = set()
    of_experts = 0
    for each in costs:
        if each.product is None:
            continue
        if each.products == 1:
            shapes.add(each.product)
        elif extension is None:  # with the extension, its kernels compute the products of experts
            of_experts += each.products
    return max((each.kept for each in costs), default=0) + _CODE * min(_MOST_SHAPES, len(shapes) + of_experts)


def _attention(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of attention on a CPU: scores and their product with values, or the three gradients."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    query, key, value = (given[name] if name in given else given[name[0]] for name in ("query", "key", "value"))
    forward = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    whole = forward * (2.5 if "grad_out" in given or "grad" in given else 1.0)
    return Cost(0.5 * whole if given.get("is_causal", given.get("causal", False)) else whole)


def _transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.shape[0] > 1


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, layout: str) -> Cost:
    """Return the cost of [rows, inner] times [inner, columns] on a CPU."""
    flops = 2.0 * rows * inner * columns
    if dtype not in _HALVES:
        return Cost(flops)
    if onednn_multiplies(dtype):
        return Cost(flops, product=(rows, inner, columns, layout))
    return Cost(flops, scratch=4 * rows * columns if layout == OUTER else 0)


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
    return found._replace(flops=2.0 * rows * out * inner, kept=panel * row_bytes)


def _ours(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of an operator of `peftcore.ops`, whose arguments have the same names in all operators."""
    if operator._schema.name.startswith("peftcore::attention"):
        return _attention(operator, args)
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    grad = given.get("grad")
    rows_of = given.get("x") if grad is None else grad
    if operator._schema.name.startswith("peftcore::dense_linear") and rows_of is not None:
        rows, (out, inner) = rows_of[..., 0].numel(), given["weight"].shape
        return Cost(2.0 * rows * out * inner)
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
        found = found._replace(flops=2.0 * rows * inner * out, products=experts)
        factors = [factor[0] for factor in factors]
    else:
        found = _frozen(rows, weight, packing, rows_of.dtype, backward=grad is not None)
    if not needs[0]:
        found = FREE
    gradients = (0, 0) if grad is None else needs[1:]  # a product more for each factor's own
    size = sum((1 + more) * factor.numel() for factor, more in zip(factors, gradients, strict=False))
    return found._replace(flops=found.flops + 2.0 * rows * size)
