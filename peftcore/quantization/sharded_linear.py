"""Linear layers with 4-bit weights under tensor parallelism: each rank holds a shard of the weight.

    column-wise   consecutive rows of the weight                 codes [rows · in / 2], one scale per block
    row-wise      some columns of every row, in full blocks      codes [out · columns / 2], one scale per block

The concatenated shards have the same bits as a weight that one process quantizes. For this, each shard must start at a
block boundary, and nested scales are computed from the scales of all ranks. A shard that does not start at a boundary
of the nested blocks stores its scales decoded, in float32.
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
from peftcore.engine.adaptation.tensor_parallel import division_of, has_plan, plan_of, style_of_hooks
from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.plugin import sharded
from peftcore.quantization.formats import FORMATS, FourBitSettings, quantize_weight
from peftcore.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


@dataclass(frozen=True)
class WeightShard:
    """Shard of a weight `[out, in]` that belongs to this rank.

    Args:
        mesh: one-dimensional device mesh.
        placement: the sharded dimension, 0 for column-wise and 1 for row-wise.
        shape: shape of the full weight.
        takes_dtensors: whether the layer maps DTensors to DTensors, between the hooks of `parallelize_module`.
        double_quant: whether the scales have been rounded by double quantization.
    """

    mesh: DeviceMesh
    placement: Shard
    shape: tuple[int, int]
    takes_dtensors: bool
    double_quant: bool = False

    def __deepcopy__(self, memo: Any) -> WeightShard:
        return self  # a mesh cannot be copied

    def bounds(self, rank: int | None = None) -> tuple[int, int]:
        """Return (start, stop) of a rank's rows or columns, by default this rank's."""
        size = self.shape[self.placement.dim]
        step, rank = -(-size // self.mesh.size()), self.mesh.get_local_rank() if rank is None else rank
        return min(rank * step, size), min((rank + 1) * step, size)

    def shape_of(self, rank: int | None = None) -> tuple[int, int]:
        """Return the shape of a rank's shard, by default this rank's."""
        start, stop = self.bounds(rank)
        return (stop - start, self.shape[1]) if self.placement.dim == 0 else (self.shape[0], stop - start)

    def slice(self, full: Tensor) -> Tensor:
        """Return this rank's slice of a full tensor `[out, in]`, or of its blocks `[out, in / blocksize]`."""
        step = self.shape[1] // full.shape[1] if self.placement.dim else 1
        start, stop = self.bounds()
        return full.narrow(self.placement.dim, start // step, (stop - start) // step)

    def all_gather(self, shard: Tensor) -> Tensor:
        """Return the full tensor from the slices of all ranks. Collective."""
        blocksize = self.shape_of()[1] // shard.shape[1]
        shapes = [self.shape_of(rank) for rank in range(self.mesh.size())]
        shapes = [(rows, columns // blocksize) for rows, columns in shapes]
        # all_gather needs tensors of equal size, but the last ranks may have smaller shards.
        longest = max(map(math.prod, shapes))
        padded = F.pad(shard.detach().reshape(-1), (0, longest - shard.numel()))
        gathered = [torch.empty_like(padded) for _ in shapes]
        distributed.all_gather(gathered, padded, group=self.mesh.get_group())
        parts = [rank_part[: math.prod(shape)].view(shape) for rank_part, shape in zip(gathered, shapes, strict=True)]
        return torch.cat(parts, self.placement.dim)

    def to_dtensor(self, shard: Tensor) -> nn.Parameter:
        """Return a frozen DTensor parameter with `shard` as this rank's dense local tensor."""
        from torch.distributed.tensor import DTensor

        shape, stride, local = torch.Size(self.shape), (self.shape[1], 1), shard.contiguous()
        parameter = DTensor.from_local(local, self.mesh, [self.placement], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(parameter, requires_grad=False)


class QuantizedShard(QuantizedLinear):
    """Quantized linear layer whose weight is sharded; `in_features` and `out_features` are sizes of the full layer.

    Its methods take and return full dense weights, and are collective.
    """

    weight_shard: WeightShard

    def dense_values(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """All-gather and dequantize the full weight from this rank's shard. Collective."""
        return self.weight_shard.all_gather(ops.dequantize_4bit(packed, dtype))

    def dequantized_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `PackedParameters.dequantized_parameter`. Collective."""
        packed = self.packed_parameter(name)
        if packed is not None:
            return self.dense_values(packed, dtype)
        weight = sharded.whole(sharded.original(self.get_parameter(name)))
        return weight if dtype is None else weight.to(dtype)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the full dense weight `[out, in]`. Collective."""
        return self.dequantized_parameter("weight", dtype)

    def dense_parameter(self, dtype: torch.dtype | None) -> nn.Parameter:
        """Return the frozen dense weight with its current sharding."""
        weight = self.get_parameter("weight")
        if not self.is_quantized:
            return weight if dtype is None else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        return self.weight_shard.to_dtensor(ops.dequantize_4bit(self.packed, dtype))

    def quantized_parameter(self, name: str, weight: Tensor) -> PackedWeight:
        """Quantize this rank's shard of a full dense weight with this layer's settings. Collective."""
        return _quantize_shard(self.weight_shard.slice(weight).contiguous(), self.settings_of(name), self.weight_shard)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_quantized:
            return super().forward(x)
        if not sharded.is_dtensor(x):
            # Under a transformers plan, x and the bias are this rank's shards, and the plan reduces the output.
            return self.full_forward(x) if self.weight_shard.takes_dtensors else super().forward(x)
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        shard, bias = self.weight_shard, self._parameters["bias"]
        mesh, local_bias = shard.mesh, None if bias is None else sharded.original(bias)
        local = x.to_local(grad_placements=[x.placements[0] if shard.placement.dim else Partial()])
        if shard.placement.dim:
            y = DTensor.from_local(self._product(local, None), mesh, [Partial()], run_check=False)
            y = y.redistribute(placements=[Replicate()])
            return y if local_bias is None else y + local_bias.to(y.dtype)
        if local_bias is not None and sharded.is_dtensor(local_bias):
            local_bias = local_bias.to_local()
        product = self._product(local, local_bias)
        shape = torch.Size([*product.shape[:-1], self.out_features])
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(product.dim() - 1)]
        return DTensor.from_local(product, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        return ops.linear_4bit(x.to(dtype), self.packed, bias).to(x.dtype)

    def full_forward(self, x: Tensor) -> Tensor:
        """Return the full layer's output for unsharded inputs, when called outside a tensor-parallel plan.

        Collective.
        """
        bias, weight = self.bias, self.dequantized(self.compute_dtype or x.dtype)
        y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return y.to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise PeftcoreError(
            f"state_dict() would contain only this rank's shard of the 4-bit weight '{prefix}weight', because the "
            "model is tensor-parallel. Save the adapter (peftcore.save), or call peftcore.dequantize(model) first"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        raise PeftcoreError(
            f"cannot load the 4-bit weight '{prefix}weight' into a tensor-parallel model. Load the dense model with "
            "its plan, then call peftcore.quantize(model)"
        )


def shard_of(module: nn.Module) -> WeightShard | None:
    """Return this rank's shard of a linear layer's weight, or None if tensor parallelism does not shard it."""
    shard = getattr(module, "weight_shard", None)
    if shard is not None:
        return cast(WeightShard, shard)
    weight: Any = module._parameters.get("weight")
    if weight is None or not sharded.is_dtensor(weight) or not isinstance(module, nn.Linear):
        return None
    division = division_of(module)
    # In a mesh of more dimensions, FSDP2 shards the weight as well.
    if division is None or weight.device_mesh.ndim != 1:
        return None
    from torch.distributed.tensor import Shard

    return WeightShard(
        mesh=division.mesh,
        placement=Shard(1 if division.by_rows else 0),
        shape=(division.outputs, division.inputs),
        takes_dtensors=division.dtensors,
    )


def check_shard_blocks(name: str, shard: WeightShard, settings: FourBitSettings) -> None:
    """Raise a PeftcoreError unless every rank's shard of the weight `name` starts at a block and is not empty."""
    columns, blocksize = shard.shape[1], settings.blocksize
    world_size, by_columns = shard.mesh.size(), shard.placement.dim
    unit = "columns" if by_columns else "rows"
    starts = [shard.bounds(rank)[0] for rank in range(world_size)]
    if shard.bounds(world_size - 1)[0] == shard.bounds(world_size - 1)[1]:
        raise PeftcoreError(
            f"'{name}' has {shard.shape[by_columns]} {unit}, so some of the {world_size} ranks would have an empty "
            "shard. Leave the layer dense: skip=[...]"
        )
    if by_columns:
        fits = columns % blocksize == 0 and all(start % blocksize == 0 for start in starts)
    else:
        fits = all(start * columns % blocksize == 0 for start in starts)
    if fits:
        return
    if not by_columns:
        unit = f"rows of {columns} values"
    raise PeftcoreError(
        f"'{name}' is sharded over {world_size} ranks after {starts[1]} {unit}, which is not a multiple of the "
        f"{blocksize} values that share a scale in {settings.quant_type}, so the quantized weight would depend on the "
        "number of ranks. Choose a smaller blocksize, of 32 or more, or leave the weight dense: "
        f"skip=['{name.removesuffix('.weight')}']"
    )


def convert_shard(module: Any, shard: WeightShard, settings: FourBitSettings) -> QuantizedShard:
    """Quantize this rank's shard of a dense layer in place. Collective."""
    settings = settings.resolved()
    shard = replace(shard, double_quant=settings.double_quant)
    packed = _quantize_shard(module.weight.detach().to_local(), settings, shard)
    return install_shard(module, packed, shard, settings.compute_dtype)


def is_sharded_after_quantization(module: QuantizedLinear) -> bool:
    """Return whether a plan or `parallelize_module` has sharded the bytes of a quantized layer like a dense weight."""
    return has_plan(module) and sharded.is_dtensor(module.weight) and module.is_quantized


def shard_quantized(module: Any, path: str) -> QuantizedShard:
    """Turn a quantized layer whose bytes `parallelize_module` has sharded into a `QuantizedShard`. Collective."""
    from torch.distributed.tensor import Shard

    weight, style = module.weight, style_of_hooks(module)
    if style is None or weight.device_mesh.ndim != 1 or module._buffers["permutation"] is not None:
        raise PeftcoreError(
            f"cannot tell how the 4-bit layer '{path}' was sharded over the ranks. Parallelize the dense model, then "
            "call peftcore.quantize(model)"
        )
    by_rows, mesh = style
    tensors = {name: t for name, t in module.packed._asdict().items() if isinstance(t, Tensor)}
    full_tensors: dict[str, Any] = {name: sharded.whole(t) for name, t in tensors.items()}
    packed = module.packed._replace(**full_tensors)
    rows, columns = packed.shape
    shard = WeightShard(
        mesh=mesh,
        placement=Shard(int(by_rows)),
        shape=(rows, columns),
        takes_dtensors=True,
        double_quant=packed.double_quant,
    )
    check_shard_blocks(f"{path}.weight", shard, module.settings_of("weight"))
    del module._parameters["weight"]
    module._parameters = {"weight": None, **module._parameters}
    return install_shard(module, _shard_packed(packed, shard), shard, module.compute_dtype)


def install_shard(
    module: Any, packed: PackedWeight, shard: WeightShard, compute_dtype: torch.dtype | None
) -> QuantizedShard:
    """Turn a sharded linear layer into a `QuantizedShard` with this rank's packed weight, in place."""
    module.__class__ = QuantizedShard
    module.weight_shard, module.compute_dtype = shard, compute_dtype
    module.set_packed_parameter("weight", packed)
    module._is_hf_initialized = True  # transformers must not initialize it again
    renew_plan(module)
    return cast(QuantizedShard, module)


def renew_plan(module: nn.Module) -> None:
    """Reinstall transformers' tensor-parallel forward, so that it calls the module's current class."""
    plan = plan_of(module)
    if plan is not None:
        del module.__dict__["forward"]
        plan["self"].install_forward(module, plan["mesh"])


def _quantize_shard(weight: Tensor, settings: FourBitSettings, shard: WeightShard) -> PackedWeight:
    """Quantize a shard to the same bits as in the quantized full weight. Collective."""
    quantize_shard = FORMATS[settings.quant_type].quantize_shard
    if quantize_shard is not None:
        return quantize_shard(weight, lambda t: t if t.is_meta else _all_reduce_max(t, shard))
    packed = quantize_weight(weight, replace(settings, double_quant=False))
    if not shard.double_quant:
        return packed
    if weight.is_meta:
        scales = packed.absmax.new_empty(-(-math.prod(shard.shape) // packed.blocksize))
    elif shard.placement.dim:
        scales = shard.all_gather(packed.absmax.view(weight.shape[0], -1))
    else:
        scales = _all_gather_scales(packed, shard)
    full_weight = ops.with_nested_scales(packed._replace(absmax=scales.reshape(-1), shape=shard.shape))
    return _take_nested_scales(packed, full_weight, shard)


def _all_reduce_max(t: Tensor, shard: WeightShard) -> Tensor:
    """Replace the tensor by its maximum over all ranks, and return it. Collective."""
    distributed.all_reduce(t, distributed.ReduceOp.MAX, group=shard.mesh.get_group())
    return t


def _all_gather_scales(packed: PackedWeight, shard: WeightShard) -> Tensor:
    """Return the scales of all ranks' rows; a block may span several rows. Collective."""
    counts = [-(-math.prod(shard.shape_of(rank)) // packed.blocksize) for rank in range(shard.mesh.size())]
    padded = F.pad(packed.absmax.reshape(-1), (0, max(counts) - packed.absmax.numel()))
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded, group=shard.mesh.get_group())
    return torch.cat([scales[:count] for scales, count in zip(gathered, counts, strict=True)])


def _take_nested_scales(packed: PackedWeight, full_weight: PackedWeight, shard: WeightShard) -> PackedWeight:
    """Return a shard with its scales taken from the nested scales of the full weight."""
    start, blocks = shard.bounds()[0], -(-math.prod(packed.shape) // packed.blocksize)
    first_block, step = start * shard.shape[1] // packed.blocksize, full_weight.nested_blocksize
    if shard.placement.dim == 0 and first_block % step == 0:
        nested = full_weight.nested_absmax
        assert nested is not None
        return full_weight._replace(
            codes=packed.codes,
            absmax=full_weight.absmax.reshape(-1)[first_block : first_block + blocks].clone(),
            nested_absmax=nested.reshape(-1)[first_block // step : -(-(first_block + blocks) // step)].clone(),
            shape=packed.shape,
        )
    scales = full_weight.scales()
    if shard.placement.dim:
        return packed._replace(absmax=shard.slice(scales.view(shard.shape[0], -1)).reshape(-1).clone())
    return packed._replace(absmax=scales[first_block : first_block + blocks].clone())


def _shard_packed(full_weight: PackedWeight, shard: WeightShard) -> PackedWeight:
    """Return this rank's shard of a full packed weight."""
    shape, (rows, columns) = shard.shape_of(), shard.shape
    start, count = shard.bounds()[0] * columns, math.prod(shape)

    def cut(t: Tensor | None, size: int) -> Tensor | None:
        """Return this rank's slice of a tensor with one value per `size` values of the weight."""
        if t is None:
            return None
        if shard.placement.dim:
            return shard.slice(t.view(rows, columns // size)).reshape(-1)
        return t.reshape(-1)[start // size : -(-(start + count) // size)].clone()

    codes = cut(full_weight.codes, 2)
    assert codes is not None
    scales: dict[str, Any] = {
        name: cut(getattr(full_weight, name), full_weight.blocksize) for name in ("absmax", "zeros")
    }
    packed = full_weight._replace(codes=codes.reshape(-1, 1).clone(), shape=shape, **scales)
    if not full_weight.double_quant:
        return packed
    if FORMATS[full_weight.quant_type].quantize_shard is not None:  # the nested scale is shared by the full weight
        nested = full_weight.nested_absmax
        assert nested is not None and packed.absmax is not None
        blocks = -(-packed.absmax.numel() // full_weight.nested_blocksize)
        return packed._replace(nested_absmax=nested.reshape(-1)[:1].repeat(blocks))
    return _take_nested_scales(
        packed._replace(nested_absmax=None, nested_quant_map=None, nested_offset=None), full_weight, shard
    )
