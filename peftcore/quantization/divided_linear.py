"""Linear layers with 4-bit weights that tensor parallelism divides: each rank has its part, in the whole's blocks.

    column-wise   rows of the weight, one after the other        codes [rows · in / 2], a scale for each block
    row-wise      columns of every row, in whole blocks          codes [out · columns / 2], likewise

The parts together have the bits of the weight that one process would quantize. So a part must begin where a block does,
and nested scales are computed from the scales of all ranks: where the part does not begin a block of scales, it has
their decoded values, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.engine.adaptation.division import division_of, has_plan, plan_of, style_of_hooks
from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.plugin import ranks
from peftcore.quantization.formats import FORMATS, FourBitSettings, quantized
from peftcore.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


@dataclass(frozen=True)
class HeldPart:
    """Part of a weight `[out, in]` that this rank has.

    Args:
        mesh: mesh of one dimension.
        placement: the divided dimension: 0 column-wise, 1 row-wise.
        shape: shape of the whole weight.
        hooked: the layer maps DTensors, between hooks of `parallelize_module`.
        double_quant: the scales have the values of nested scales.
    """

    mesh: DeviceMesh
    placement: Shard
    shape: tuple[int, int]
    hooked: bool
    double_quant: bool = False

    def __deepcopy__(self, memo: Any) -> HeldPart:
        return self  # a mesh cannot be copied

    def bounds(self, rank: int | None = None) -> tuple[int, int]:
        """Return (first, last) of the rows or columns of a rank of the mesh, by default this one."""
        size = self.shape[self.placement.dim]
        step, rank = -(-size // self.mesh.size()), self.mesh.get_local_rank() if rank is None else rank
        return min(rank * step, size), min((rank + 1) * step, size)

    def shape_of(self, rank: int | None = None) -> tuple[int, int]:
        """Return the shape of a rank's part."""
        first, last = self.bounds(rank)
        return (last - first, self.shape[1]) if self.placement.dim == 0 else (self.shape[0], last - first)

    def of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor `[out, in]`, or of its blocks `[out, in / blocksize]`."""
        step = self.shape[1] // whole.shape[1] if self.placement.dim else 1
        first, last = self.bounds()
        return whole.narrow(self.placement.dim, first // step, (last - first) // step)

    def whole(self, part: Tensor) -> Tensor:
        """Return the whole of `of`. Collective."""
        blocksize = self.shape_of()[1] // part.shape[1]
        shapes = [self.shape_of(rank) for rank in range(self.mesh.size())]
        shapes = [(rows, columns // blocksize) for rows, columns in shapes]
        longest = max(map(math.prod, shapes))
        padded = F.pad(part.detach().reshape(-1), (0, longest - part.numel()))
        everyone = [torch.empty_like(padded) for _ in shapes]
        distributed.all_gather(everyone, padded, group=self.mesh.get_group())
        parts = [rank_part[: math.prod(shape)].view(shape) for rank_part, shape in zip(everyone, shapes, strict=True)]
        return torch.cat(parts, self.placement.dim)

    def dtensor(self, part: Tensor) -> nn.Parameter:
        """Return the frozen parameter of a layer with dense weights of which this rank has `part`."""
        from torch.distributed.tensor import DTensor

        shape, stride, local = torch.Size(self.shape), (self.shape[1], 1), part.contiguous()
        parameter = DTensor.from_local(local, self.mesh, [self.placement], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(parameter, requires_grad=False)


class QuantizedPart(QuantizedLinear):
    """Quantized linear layer of which this rank has a part; `in_features` and `out_features` are those of the whole.

    Its methods take and return whole dense weights, and are collective.
    """

    held_part: HeldPart

    def dense_values(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole dense weight of which `packed` is this rank's part. Collective."""
        return self.held_part.whole(ops.dequantize_4bit(packed, dtype))

    def dequantized_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `PackedParameters.dequantized_parameter`. Collective."""
        packed = self.packed_parameter(name)
        if packed is not None:
            return self.dense_values(packed, dtype)
        weight = ranks.whole(ranks.behind(self.get_parameter(name)))
        return weight if dtype is None else weight.to(dtype)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole dense weight `[out, in]`. Collective."""
        return self.dequantized_parameter("weight", dtype)

    def dense_parameter(self, dtype: torch.dtype | None) -> nn.Parameter:
        """Return the frozen dense weight, divided as it is now."""
        weight = self.get_parameter("weight")
        if not self.is_quantized:
            return weight if dtype is None else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        return self.held_part.dtensor(ops.dequantize_4bit(self.packed, dtype))

    def quantized_parameter(self, name: str, weight: Tensor) -> PackedWeight:
        """Return this rank's part of a whole dense weight, quantized with this layer's settings. Collective."""
        return _quantized(self.held_part.of(weight).contiguous(), self.settings_of(name), self.held_part)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_quantized:
            return super().forward(x)
        if not ranks.is_dtensor(x):  # within a plan: without gradients, x and the bias are this rank's; the plan sums
            return self.whole_forward(x) if self.held_part.hooked else super().forward(x)
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        part, bias = self.held_part, self._parameters["bias"]
        mesh, local_bias = part.mesh, None if bias is None else ranks.behind(bias)
        local = x.to_local(grad_placements=[x.placements[0] if part.placement.dim else Partial()])
        if part.placement.dim:
            y = DTensor.from_local(self._product(local, None), mesh, [Partial()], run_check=False)
            y = y.redistribute(placements=[Replicate()])
            return y if local_bias is None else y + local_bias.to(y.dtype)
        if local_bias is not None and ranks.is_dtensor(local_bias):
            local_bias = local_bias.to_local()
        product = self._product(local, local_bias)
        shape = torch.Size([*product.shape[:-1], self.out_features])
        stride = torch.empty(shape, device="meta").stride()
        last = [Shard(product.dim() - 1)]
        return DTensor.from_local(product, mesh, last, run_check=False, shape=shape, stride=stride)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        return ops.linear_4bit(x.to(dtype), self.packed, bias).to(x.dtype)

    def whole_forward(self, x: Tensor) -> Tensor:
        """Return the whole layer's output of whole inputs, outside a plan. Collective."""
        bias, weight = self.bias, self.dequantized(self.compute_dtype or x.dtype)
        y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return y.to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise PeftcoreError(
            f"'{prefix}weight' is in 4 bits and divided over the ranks by tensor parallelism, so state_dict() would "
            "have a part of it. Save the adapter (peftcore.save), or call peftcore.dequantize(model) first"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        raise PeftcoreError(
            f"'{prefix}weight' is in 4 bits and divided over the ranks by tensor parallelism, and cannot be loaded. "
            "Load the dense model with its plan, then call peftcore.quantize(model)"
        )


def part_of(module: nn.Module) -> HeldPart | None:
    """Return the part that this rank has of a linear layer's weight, or None if it is not divided, or otherwise."""
    held = getattr(module, "held_part", None)
    if held is not None:
        return cast(HeldPart, held)
    weight: Any = module._parameters.get("weight")
    if weight is None or not ranks.is_dtensor(weight) or not isinstance(module, nn.Linear):
        return None
    division = division_of(module)
    if division is None or weight.device_mesh.ndim != 1:  # else FSDP2 has its parts, too
        return None
    from torch.distributed.tensor import Shard

    return HeldPart(
        mesh=division.mesh,
        placement=Shard(1 if division.by_rows else 0),
        shape=(division.outputs, division.inputs),
        hooked=division.dtensors,
    )


def refuse_blocks(name: str, part: HeldPart, settings: FourBitSettings) -> None:
    """Raise a PeftcoreError unless the part of every rank of the weight `name` begins a block, and is not empty."""
    columns, blocksize = part.shape[1], settings.blocksize
    count, across = part.mesh.size(), part.placement.dim
    begins = [part.bounds(rank)[0] for rank in range(count)]
    if part.bounds(count - 1)[0] == part.bounds(count - 1)[1]:
        raise PeftcoreError(
            f"'{name}' has {part.shape[across]} {'columns' if across else 'rows'}, of which some of {count} ranks have "
            "none. Leave it dense: skip=[...]"
        )
    if across:
        fits = columns % blocksize == 0 and all(begin % blocksize == 0 for begin in begins)
    else:
        fits = all(begin * columns % blocksize == 0 for begin in begins)
    if fits:
        return
    unit = "columns" if across else f"rows of {columns} values"
    raise PeftcoreError(
        f"'{name}' is divided over {count} ranks after {begins[1]} {unit}, which is not a multiple of the {blocksize} "
        f"values that share a scale in {settings.quant_type}: its 4 bits would not be those of one process. Choose a "
        f"smaller blocksize, of 32 or more, or leave the weight dense: skip=['{name.removesuffix('.weight')}']"
    )


def convert_part(module: Any, part: HeldPart, settings: FourBitSettings) -> QuantizedPart:
    """Quantize this rank's part of a dense layer in place. Collective."""
    settings = settings.resolved()
    part = replace(part, double_quant=settings.double_quant)
    packed = _quantized(module.weight.detach().to_local(), settings, part)
    return hold_part(module, packed, part, settings.compute_dtype)


def is_divided_later(module: QuantizedLinear) -> bool:
    """Return whether a plan or `parallelize_module` has divided the bytes of a quantized layer like a dense weight."""
    return has_plan(module) and ranks.is_dtensor(module.weight) and module.is_quantized


def divide_quantized(module: Any, path: str) -> QuantizedPart:
    """Turn a quantized layer whose bytes `parallelize_module` has divided into one of this rank's part. Collective."""
    from torch.distributed.tensor import Shard

    weight, style = module.weight, style_of_hooks(module)
    if style is None or weight.device_mesh.ndim != 1 or module._buffers["permutation"] is not None:
        raise PeftcoreError(
            f"'{path}' is in 4 bits, and was divided over the ranks in a way that cannot be followed. Divide the dense "
            "model, then call peftcore.quantize(model)"
        )
    by_rows, mesh = style
    tensors = {name: t for name, t in module.packed._asdict().items() if isinstance(t, Tensor)}
    whole: dict[str, Any] = {name: ranks.whole(t) for name, t in tensors.items()}
    packed = module.packed._replace(**whole)
    rows, columns = packed.shape
    part = HeldPart(
        mesh=mesh,
        placement=Shard(int(by_rows)),
        shape=(rows, columns),
        hooked=True,
        double_quant=packed.double_quant,
    )
    refuse_blocks(f"{path}.weight", part, module.settings_of("weight"))
    del module._parameters["weight"]
    module._parameters = {"weight": None, **module._parameters}
    return hold_part(module, _part_of_packed(packed, part), part, module.compute_dtype)


def hold_part(module: Any, packed: PackedWeight, part: HeldPart, compute_dtype: torch.dtype | None) -> QuantizedPart:
    """Turn a divided linear layer into a `QuantizedPart` with this rank's part, in place."""
    module.__class__ = QuantizedPart
    module.held_part, module.compute_dtype = part, compute_dtype
    module.set_packed_parameter("weight", packed)
    module._is_hf_initialized = True  # transformers must not initialise it again
    renew_plan(module)
    return cast(QuantizedPart, module)


def renew_plan(module: nn.Module) -> None:
    """Make the plan of transformers call the forward of the module's present class."""
    plan = plan_of(module)
    if plan is not None:
        del module.__dict__["forward"]
        plan["self"].install_forward(module, plan["mesh"])


def _quantized(part: Tensor, settings: FourBitSettings, held: HeldPart) -> PackedWeight:
    """Return a part, quantized as if the whole was. Collective."""
    by_whole = FORMATS[settings.quant_type].quantize_part
    if by_whole is not None:
        return by_whole(part, lambda t: t if t.is_meta else _largest(t, held))
    packed = quantized(part, replace(settings, double_quant=False))
    if not held.double_quant:
        return packed
    if part.is_meta:
        scales = packed.absmax.new_empty(-(-math.prod(held.shape) // packed.blocksize))
    elif held.placement.dim:
        scales = held.whole(packed.absmax.view(part.shape[0], -1))
    else:
        scales = _joined(packed, held)
    whole = ops.with_nested_scales(packed._replace(absmax=scales.reshape(-1), shape=held.shape))
    return _with_scales_of(packed, whole, held)


def _largest(t: Tensor, held: HeldPart) -> Tensor:
    """Return the largest of all ranks' values. Collective."""
    distributed.all_reduce(t, distributed.ReduceOp.MAX, group=held.mesh.get_group())
    return t


def _joined(packed: PackedWeight, held: HeldPart) -> Tensor:
    """Return the scales of all ranks' rows, in whole blocks that may have parts of several rows. Collective."""
    counts = [-(-math.prod(held.shape_of(rank)) // packed.blocksize) for rank in range(held.mesh.size())]
    padded = F.pad(packed.absmax.reshape(-1), (0, max(counts) - packed.absmax.numel()))
    everyone = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(everyone, padded, group=held.mesh.get_group())
    return torch.cat([scales[:count] for scales, count in zip(everyone, counts, strict=True)])


def _with_scales_of(packed: PackedWeight, whole: PackedWeight, held: HeldPart) -> PackedWeight:
    """Return a part with its scales out of those of the whole weight, which are nested."""
    first, blocks = held.bounds()[0], -(-math.prod(packed.shape) // packed.blocksize)
    begin, step = first * held.shape[1] // packed.blocksize, whole.nested_blocksize
    if held.placement.dim == 0 and begin % step == 0:
        nested = whole.nested_absmax
        assert nested is not None
        return whole._replace(
            codes=packed.codes,
            absmax=whole.absmax.reshape(-1)[begin : begin + blocks].clone(),
            nested_absmax=nested.reshape(-1)[begin // step : -(-(begin + blocks) // step)].clone(),
            shape=packed.shape,
        )
    scales = whole.scales()
    if held.placement.dim:
        return packed._replace(absmax=held.of(scales.view(held.shape[0], -1)).reshape(-1).clone())
    return packed._replace(absmax=scales[begin : begin + blocks].clone())


def _part_of_packed(whole: PackedWeight, held: HeldPart) -> PackedWeight:
    """Return this rank's part of a whole packed weight."""
    shape, (rows, columns) = held.shape_of(), held.shape
    first, count = held.bounds()[0] * columns, math.prod(shape)

    def cut(t: Tensor | None, size: int) -> Tensor | None:
        """Return this rank's part of a tensor with a value for `size` values of the weight."""
        if t is None:
            return None
        if held.placement.dim:
            return held.of(t.view(rows, columns // size)).reshape(-1)
        return t.reshape(-1)[first // size : -(-(first + count) // size)].clone()

    codes = cut(whole.codes, 2)
    assert codes is not None
    scales: dict[str, Any] = {name: cut(getattr(whole, name), whole.blocksize) for name in ("absmax", "zeros")}
    part = whole._replace(codes=codes.reshape(-1, 1).clone(), shape=shape, **scales)
    if not whole.double_quant:
        return part
    if FORMATS[whole.quant_type].quantize_part is not None:  # the scale of the scales is that of the whole weight
        nested = whole.nested_absmax
        assert nested is not None and part.absmax is not None
        blocks = -(-part.absmax.numel() // whole.nested_blocksize)
        return part._replace(nested_absmax=nested.reshape(-1)[:1].repeat(blocks))
    return _with_scales_of(part._replace(nested_absmax=None, nested_quant_map=None, nested_offset=None), whole, held)
