"""Cost of an operator: floating-point operations, and memory in addition to its inputs and output.

The memory that PyTorch's libraries allocate inside a matrix product on a CPU follows two rules, measured on a Zen 5
with oneDNN 3.11: oneDNN caches code for each shape of a 16-bit product, and without oneDNN, PyTorch accumulates xᵀ w in
an fp32 copy.
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
_CODE = 550_000  # bytes that oneDNN caches per shape
_MOST_SHAPES = 1024  # oneDNN's cache size in shapes (ONEDNN_PRIMITIVE_CACHE_CAPACITY)


class Cost(NamedTuple):
    """Cost of one call of an operator.

    Args:
        flops: Floating-point operations; a multiplication and an addition count as two.
        scratch: Bytes that are allocated and freed during the call.
        kept: Bytes that the thread keeps for later calls. Of all operators, it keeps the largest buffer.
        product: (rows, inner, columns, layout) of a product for which oneDNN caches code.
        products: Number of such products; the products of experts differ in their shapes.
    """

    flops: float = 0.0
    scratch: int = 0
    kept: int = 0
    product: tuple[int, int, int, str] | None = None
    products: int = 1


FREE = Cost()


def cost(operator: Any, args: tuple[Any, ...], output: Any, *, on_card: bool) -> Cost:
    """Return the cost of an operator. Memory allocated by GPU libraries is not modelled."""
    name = operator._schema.name
    if name.startswith("peftcore::"):
        operator_cost = _peftcore_cost(operator, args)
        return Cost(operator_cost.flops) if on_card else operator_cost
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return _attention(operator, args)
    formula = flop_registry.get(operator.overloadpacket)
    if formula is None:
        return FREE
    flops = float(formula(*args, out_val=output))
    if on_card or name not in ("aten::mm", "aten::addmm"):
        return Cost(flops)
    left, right = args[-2:] if name == "aten::mm" else args[1:3]
    layout = PLAIN
    if _is_transposed(left):
        layout = OUTER
    elif _is_transposed(right):
        layout = TRANSPOSED
    return _product(left.shape[0], left.shape[1], right.shape[1], left.dtype, layout)._replace(flops=flops)


def retained_bytes(costs: Sequence[Cost]) -> int:
    """Return the number of bytes that operators with these costs keep after the step."""
    shapes: set[tuple[int, int, int, str]] = set()
    products_of_experts = 0
    for operator_cost in costs:
        if operator_cost.product is None:
            continue
        if operator_cost.products == 1:
            shapes.add(operator_cost.product)
        elif extension is None:  # the extension has its own kernels for the products of experts
            products_of_experts += operator_cost.products
    largest = max((operator_cost.kept for operator_cost in costs), default=0)
    return largest + _CODE * min(_MOST_SHAPES, len(shapes) + products_of_experts)


def _attention(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of attention on a CPU: scores and their product with values, or the three gradients."""
    arguments = _arguments_by_name(operator, args)
    # argument names of peftcore's operators
    query, key, value = (arguments[name if name in arguments else name[0]] for name in ("query", "key", "value"))
    flops = 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if "grad_out" in arguments or "grad" in arguments:  # five products instead of two
        flops *= 2.5
    if arguments.get("is_causal", arguments.get("causal", False)):
        flops *= 0.5
    return Cost(flops)


def _arguments_by_name(operator: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))


def _is_transposed(matrix: Tensor) -> bool:
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
    """Return the cost of x Wᵀ, or of dy W with `backward`. A 4-bit weight is unpacked in panels."""
    out, inner = packing[-2:] if packing else weight[0].shape[-2:]
    if not packing:
        return _product(rows, out, inner, dtype, PLAIN) if backward else _product(rows, inner, out, dtype, TRANSPOSED)
    limit, row_bytes = PANEL_BYTES["backward" if backward else "forward"], inner * dtype.itemsize
    panel = out
    if out * row_bytes > limit:
        multiple = PackedWeight(weight[0], weight[1], weight[2], (out, inner), packing[0]).rows_that_begin_blocks()
        panel = min(out, max(1, limit // (row_bytes * multiple)) * multiple)
    layout = PLAIN if backward else TRANSPOSED
    panel_cost = _product(rows, *((panel, inner) if backward else (inner, panel)), dtype, layout)
    return panel_cost._replace(flops=2.0 * rows * out * inner, kept=panel * row_bytes)


def _peftcore_cost(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of an operator of `peftcore.ops`, whose arguments have the same names in all operators."""
    if operator._schema.name.startswith("peftcore::attention"):
        return _attention(operator, args)
    arguments = _arguments_by_name(operator, args)
    grad = arguments.get("grad")
    x = arguments.get("x") if grad is None else grad
    if operator._schema.name.startswith("peftcore::dense_linear") and x is not None:
        rows, (out, inner) = x[..., 0].numel(), arguments["weight"].shape
        return Cost(2.0 * rows * out * inner)
    if "packing" not in arguments or x is None:
        return FREE
    needs = arguments.get("needs", (True, True, True))  # whether gradients of x, A and B are computed
    base = _base_cost(arguments, x, backward=grad is not None) if needs[0] else FREE
    needs_factors = (0, 0) if grad is None else needs[1:]
    return base._replace(flops=base.flops + _low_rank_flops(arguments, x, needs_factors))


def _base_cost(arguments: dict[str, Any], x: Tensor, *, backward: bool) -> Cost:
    """Return the cost of the product with the frozen weight, which may be a stacked weight of experts."""
    weight, packing, rows = arguments["weight"], arguments["packing"], x[..., 0].numel()
    if "offsets" not in arguments:
        return _frozen(rows, weight, packing, x.dtype, backward)
    experts = arguments["offsets"].numel()  # each row goes to one expert
    out, inner = packing[-2:] if packing else weight[0].shape[-2:]
    expert_cost = _product(-(-rows // experts), inner, out, x.dtype, TRANSPOSED)
    return expert_cost._replace(flops=2.0 * rows * inner * out, products=experts)


def _low_rank_flops(arguments: dict[str, Any], x: Tensor, needs_factors: Sequence[bool | int]) -> float:
    """Return the number of operations of the low-rank products. The gradient of a factor takes one more product."""
    factors = [arguments[name] for name in ("a", "b") if name in arguments]
    factors = factors or list(arguments.get("factors", ()))[:2]
    factors = [factor[0] if isinstance(factor, list) else factor for factor in factors]  # all samples have equal sizes
    if "offsets" in arguments:
        factors = [factor[0] for factor in factors]  # each row is multiplied by one expert's factors
    products = 0
    for factor, needs_gradient in zip(factors, needs_factors, strict=False):
        products += (1 + needs_gradient) * factor.numel()
    return 2.0 * x[..., 0].numel() * products
