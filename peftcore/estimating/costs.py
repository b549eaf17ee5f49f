"""What an operator costs: floating-point operations, and memory beside its inputs and its output.

PyTorch's libraries take memory inside an operator. Measured with a counting allocator on one AVX-512 core without dot
products of bf16 (PyTorch 2.13): oneDNN computes a product of 16-bit matrices through fp32, all M x N results at once,
beside panels of its operands, and keeps code and tables for each of the last 1,024 shapes; MKL keeps packed fp32 panels
for good, and where they are too small for a product, larger ones beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peftcore.ops.linear_4bit import PANEL_BYTES
from peftcore.ops.weight import PackedWeight

# Bytes of a thread, those of them that are never written, and bytes of each column, up to so many columns; of few rows
# next to nothing is written.
_MKL_TAKES, _MKL_UNTOUCHED, _MKL_OF_A_COLUMN, _MKL_COLUMNS, _MKL_FEW_ROWS = 4.5e6, 3.9e6, 1640, 9000, 384
_ONEDNN_OF_A_SHAPE, _ONEDNN_SHAPES = 40e3, 1024


class Cost(NamedTuple):
    """Of one operator.

    Args:
        flops: a multiplication and an addition are two.
        scratch: bytes that are taken and given back.
        kept: bytes that stay with the thread, of which the largest of all operators counts.
        product: (rows, inner, columns) of a product that a library computes.
        products: how many of them; those of experts are unlike one another.
        single: are they in fp32?
    """

    flops: float = 0.0
    scratch: int = 0
    kept: int = 0
    product: tuple[int, int, int] | None = None
    products: int = 1
    single: bool = True


FREE = Cost()


def cost(operator: Any, args: tuple[Any, ...], tensors: list[Tensor], output: Any) -> Cost:
    """What an operator costs on a CPU."""
    name = operator._schema.name
    if name.startswith("peftcore::"):
        return _ours(operator, args)
    formula = flop_registry.get(operator.overloadpacket)
    if formula is None:
        return FREE
    flops = float(formula(*args, out_val=output))
    if name in ("aten::mm", "aten::addmm"):
        left, right = args[-2:] if name == "aten::mm" else args[1:3]
        return _product(left.shape[0], left.shape[1], right.shape[1], left.dtype)._replace(flops=flops)
    return Cost(flops)


class Kept(NamedTuple):
    """Bytes that stay when a step is over: `allocated`, of which so many were `touched`."""

    allocated: int
    touched: int


def kept(costs: Sequence[Cost]) -> Kept:
    """What operators of these costs keep, and PyTorch's libraries with them."""
    panels: list[float] = []
    shapes, unlike, untouched = set(), 0, 0.0
    for each in costs:
        if each.product is None:
            continue
        rows, _, columns = each.product
        if not each.single:
            if each.products == 1:
                shapes.add(each.product)
            else:
                unlike += each.products
        elif min(rows, columns) >= 64 and torch.backends.mkl.is_available():
            panel = torch.get_num_threads() * _MKL_TAKES + _MKL_OF_A_COLUMN * min(columns, _MKL_COLUMNS)
            if panel > max(panels, default=0):
                panels.append(panel)
                few = rows <= _MKL_FEW_ROWS
                untouched += panel - 0.6e6 if few else _MKL_UNTOUCHED * torch.get_num_threads()
    code = _ONEDNN_OF_A_SHAPE * min(_ONEDNN_SHAPES, len(shapes) + unlike)
    ours = max(each.kept for each in costs)
    return Kept(int(ours + code + sum(panels)), int(ours + code + sum(panels) - untouched))


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Cost:
    """[rows, inner] times [inner, columns]."""
    found = Cost(2.0 * rows * inner * columns, product=(rows, inner, columns))
    if dtype is torch.float32:
        return found
    if dtype.itemsize != 2:
        return found._replace(product=None)
    scratch = 4 * rows * columns + 2 * min(inner, 1024) * min(columns, 4096)
    return found._replace(single=False, scratch=0 if torch.cpu._is_avx512_bf16_supported() else scratch)


def _frozen(rows: int, weight: list[Tensor], packing: list[int], dtype: torch.dtype, backward: bool = False) -> Cost:
    """x Wᵀ, or with `backward` dy W, by panels of a weight in 4 bits."""
    out, inner = packing[-2:] if packing else weight[0].shape[-2:]
    if not packing:
        return _product(rows, out, inner, dtype) if backward else _product(rows, inner, out, dtype)
    limit, row_bytes = PANEL_BYTES["backward" if backward else "forward"], inner * dtype.itemsize
    panel = out
    if out * row_bytes > limit:
        multiple = PackedWeight(weight[0], weight[1], weight[2], (out, inner), packing[0]).rows_that_begin_blocks()
        panel = min(out, max(1, limit // (row_bytes * multiple)) * multiple)
    found = _product(rows, panel, inner, dtype) if backward else _product(rows, inner, panel, dtype)
    return found._replace(flops=2.0 * rows * out * inner, kept=panel * row_bytes)


def _ours(operator: Any, args: tuple[Any, ...]) -> Cost:
    """Of an operator of `peftcore.ops`, by what its arguments are called there: all write them alike."""
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
    grad = given.get("grad")
    rows_of = given.get("x") if grad is None else grad
    if "packing" not in given or rows_of is None:
        return FREE
    weight, packing, needs = given["weight"], given["packing"], given.get("needs", (True, True, True))
    rows = rows_of[..., 0].numel()
    factors = [given[name] for name in ("a", "b") if name in given] or list(given.get("factors", ()))[:2]
    factors = [factor[0] if isinstance(factor, list) else factor for factor in factors]  # of samples, all of one size
    if "offsets" in given:  # each row meets one expert
        experts = given["offsets"].numel()
        out, inner = packing[-2:] if packing else weight[0].shape[-2:]
        found = _product(-(-rows // experts), inner, out, rows_of.dtype)
        found = found._replace(flops=2.0 * rows * inner * out, products=experts)
        factors = [factor[0] for factor in factors]
    else:
        found = _frozen(rows, weight, packing, rows_of.dtype, backward=grad is not None)
    if not needs[0]:
        found = FREE
    again = (0, 0) if grad is None else needs[1:]
    thin = sum((1 + more) * factor.numel() for factor, more in zip(factors, again, strict=False))
    return found._replace(flops=found.flops + 2.0 * rows * thin)
