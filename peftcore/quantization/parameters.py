"""Modules with 4-bit parameters: the parameter holds the packed codes, buffers hold the scales.

    weight         uint8 [ceil(n / 2), 1], frozen      absmax, quant_map, nested_absmax, ..
    gate_up_proj   likewise                            gate_up_proj_absmax, gate_up_proj_quant_map, ..

`state_dict()` has bitsandbytes' keys (see bitsandbytes_format.py). Casts of the module (`.to(dtype)`, `.half()`) change
dense tensors only. Merging may replace a quantized parameter by a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.quantization.formats import FORMATS, PARTS, FourBitSettings, from_tensors, quantize_weight, to_tensors

BUFFERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset", "zeros", "permutation")
_BY_EXPERT = ("codes", "absmax", "nested_absmax", "zeros")  # tensors of a packed weight that differ between experts


@dataclass(frozen=True)
class Packing:
    """Metadata of a `PackedWeight` and the names of the buffers that hold its tensors.

    Args:
        shape: shape of the parameter.
        blocksize: number of weights that share a scale.
        dtype: original dtype.
        quant_type: name of the format.
        nested_blocksize: number of scales that share a nested scale.
        buffers: names of the buffers, in the order of `BUFFERS`.
        turned: whether the packed weight is the transpose of each expert of the parameter.
    """

    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    quant_type: str
    nested_blocksize: int
    buffers: tuple[str, ...]
    turned: bool = False

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        return swap_last_dims(self.shape) if self.turned else self.shape


class PackedParameters(nn.Module):
    """Mixin for modules with 4-bit parameters. `packings` has every parameter that is or was quantized, by name.

    Args:
        compute_dtype: dtype of the products. The input is cast to it and the output is cast back. None means the
            input's dtype.
    """

    packings: Mapping[str, Packing] = {}
    compute_dtype: torch.dtype | None = None

    def packed_parameter(self, name: str) -> PackedWeight | None:
        """Return the 4-bit parameter without copying, or None if it is dense."""
        packing, codes = self.packings.get(name), self._parameters.get(name)
        if packing is None or codes is None or codes.dtype is not torch.uint8:
            return None
        tensors: dict[str, Any] = dict(zip(BUFFERS, map(self._buffers.get, packing.buffers), strict=True))
        return PackedWeight(
            codes=codes,
            shape=packing.packed_shape,
            blocksize=packing.blocksize,
            dtype=packing.dtype,
            quant_type=packing.quant_type,
            nested_blocksize=packing.nested_blocksize,
            turned=packing.turned,
            **tensors,
        )

    def set_packed_parameter(self, name: str, weight: PackedWeight) -> None:
        """Set the parameter to a packed weight. The `nn.Parameter` stays the same object if it was packed already."""
        prefix = "" if name == "weight" else f"{name}_"
        names = tuple(prefix + part for part in BUFFERS)
        packing = Packing(
            shape=parameter_shape(weight),
            blocksize=weight.blocksize,
            dtype=weight.dtype,
            quant_type=weight.quant_type,
            nested_blocksize=weight.nested_blocksize,
            buffers=names,
            turned=weight.turned,
        )
        # Assign a new dictionary, because shallow copies of this module share the old one.
        self.packings = {**self.packings, name: packing}
        parameter = self._parameters.get(name)
        if parameter is not None and parameter.dtype is torch.uint8 and not parameter.is_meta:
            if parameter is not weight.codes:
                parameter.data = weight.codes
        else:
            codes = weight.codes
            self._parameters[name] = codes if isinstance(codes, nn.Parameter) else nn.Parameter(codes, False)
        for part, buffer in zip(BUFFERS, names, strict=True):
            self.register_buffer(buffer, getattr(weight, part))

    def dense_values(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantize a packed weight to the parameter's layout, by default in its original dtype."""
        dense = ops.dequantize_4bit(packed, dtype)
        return dense.mT.contiguous() if packed.turned else dense

    def dequantized_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense values of a parameter, quantized or not; by default in its original dtype."""
        packed = self.packed_parameter(name)
        if packed is not None:
            return self.dense_values(packed, dtype)
        parameter = self.get_parameter(name).detach()
        return parameter if dtype is None else parameter.to(dtype)

    def quantized_parameter(self, name: str, weight: Tensor) -> PackedWeight:
        """Quantize a dense weight with this parameter's settings."""
        packing = self.packings[name]
        permutation = self._buffers[packing.buffers[BUFFERS.index("permutation")]]
        if permutation is None:
            return quantize_by_expert(weight, self.settings_of(name), packing.turned)
        permutation = permutation.to(weight.device)
        packed = quantize_by_expert(weight.index_select(-1, permutation), self.settings_of(name), packing.turned)
        return packed._replace(permutation=permutation)

    def settings_of(self, name: str) -> FourBitSettings:
        """Return the settings with which a parameter was quantized."""
        packing = self.packings[name]
        nested_absmax = self._buffers[packing.buffers[BUFFERS.index("nested_absmax")]]
        return FourBitSettings(
            quant_type=packing.quant_type,
            double_quant=nested_absmax is not None,
            blocksize=packing.blocksize,
            compute_dtype=self.compute_dtype,
        )

    def forget_packing(self, name: str) -> None:
        """Remove the packing and the buffers of a parameter that is dense again."""
        for buffer in self.packings[name].buffers:
            del self._buffers[buffer]
        self.packings = {other_name: packing for other_name, packing in self.packings.items() if other_name != name}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedParameters:
        # A cast to half precision would round the scales, and `type(dtype)` would read bytes as numbers.
        packed_ids: set[int] = set()
        for name, packing in self.packings.items():
            packed_ids.update(id(self._buffers[buffer]) for buffer in packing.buffers)
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype is torch.uint8:
                packed_ids.add(id(parameter))
        apply: Any = super()._apply
        return apply(lambda t: _move_bytes(t, fn) if id(t) in packed_ids else fn(t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, packing in self.packings.items():
            for buffer in packing.buffers:
                destination.pop(prefix + buffer, None)
            packed = self.packed_parameter(name)
            if packed is not None and not packed.codes.is_meta:
                for part, tensor in to_tensors(packed).items():
                    destination[f"{prefix}{name}.{part}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        buffers = list(chain.from_iterable(packing.buffers for packing in self.packings.values()))
        # torch.distributed.checkpoint's `set_model_state_dict` adds the module's own buffers to the state dict.
        handled = {prefix + key for key in buffers if state_dict.get(prefix + key, 0) is self._buffers.get(key)}
        for name in self.packings:
            full = prefix + name
            parts = {part: state_dict[f"{full}.{part}"] for part in PARTS if f"{full}.{part}" in state_dict}
            handled |= {full, *(f"{full}.{part}" for part in parts)}
            if full in state_dict:
                try:
                    self._load_parameter(name, state_dict[full], parts, full)
                except (PeftcoreError, TypeError, ValueError) as error:
                    error_msgs.append(str(error))
            elif strict:
                missing_keys.append(full)
        remaining = {key: value for key, value in state_dict.items() if key not in handled}
        buffer_values = {key: self._buffers.pop(key) for key in buffers if key in self._buffers}
        parameters = dict(self._parameters)
        for name in self.packings:
            del self._parameters[name]
        try:
            arguments = (remaining, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(*arguments)
        finally:
            self._buffers.update(buffer_values)
            self._parameters = {name: self._parameters.get(name, p) for name, p in parameters.items()}

    def _load_parameter(self, name: str, weight: Tensor, parts: dict[str, Tensor], full: str) -> None:
        shape, parameter = self.packings[name].shape, self.get_parameter(name)
        device = weight.device if parameter.is_meta else parameter.device
        if not parts and weight.is_floating_point():
            if tuple(weight.shape) != shape:
                raise PeftcoreError(f"'{full}' has shape {list(weight.shape)}, but the layer needs {list(shape)}")
            refuse_non_finite(weight, full)
            packed = self.quantized_parameter(name, weight.to(device))
        else:
            packed = from_tensors(weight, parts, full)
            check_shape(packed, shape, full)
            check_experts(packed, full)
            packed = packed._replace(codes=packed.codes.to(device, copy=True))
        self.set_packed_parameter(name, packed.to(device))

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, packing in self.packings.items():
            storage = packing.quant_type if self.packed_parameter(name) is not None else "dense"
            double = double_quant_text(packing.quant_type, self._buffers[packing.buffers[2]])
            parts.append(f"{name}={list(packing.shape)} {storage}, blocksize={packing.blocksize}{double}")
        return "; ".join(filter(None, parts))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Let torch.distributed.checkpoint resolve keys such as `weight.absmax`; it calls this method."""
        return dict.fromkeys(self.packings, "_any_path")

    @property
    def _any_path(self) -> _AnyPath:
        return _AnyPath()


def packed_codes(model: nn.Module) -> list[nn.Parameter]:
    """Return the model's parameters that hold 4-bit codes, without duplicates."""
    codes: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, PackedParameters):
            parameters = (module._parameters.get(name) for name in module.packings)
            codes |= {p: None for p in parameters if p is not None and p.dtype is torch.uint8}
    return list(codes)


class _AnyPath:
    """Placeholder object with every attribute, since there are no modules behind keys such as `weight.absmax`."""

    def __getattr__(self, name: str) -> _AnyPath:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def double_quant_text(quant_type: str, nested_absmax: Tensor | None) -> str:
    """Return the part of `extra_repr` about nested scales, which only some formats have as an option."""
    is_option = FORMATS[quant_type].settings(True, 64)[0]
    return ", double_quant" if is_option and nested_absmax is not None else ""


def swap_last_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with its last two dimensions swapped."""
    return (*shape[:-2], shape[-1], shape[-2])


def parameter_shape(weight: PackedWeight) -> tuple[int, ...]:
    """Return the shape of the parameter that the packed weight represents."""
    return swap_last_dims(weight.shape) if weight.turned else weight.shape


def quantize_by_expert(weight: Tensor, settings: FourBitSettings, turned: bool = False) -> PackedWeight:
    """Quantize `[experts, .., ..]` expert by expert to save memory.

    The result is bit-identical to quantizing in one call.

    Args:
        turned: quantize the transpose of each expert.
    """
    experts = weight.shape[0] if weight.dim() > 2 and not weight.is_meta else 1
    if experts < 2 or (weight.numel() // experts) % settings.blocksize:
        packed = quantize_weight(weight.mT if turned else weight, settings)
        return packed._replace(turned=turned)
    return quantize_experts(iter(weight), tuple(weight.shape), settings, turned)


def quantize_experts(
    experts: Iterable[Tensor],
    shape: tuple[int, ...],
    settings: FourBitSettings,
    turned: bool = False,
) -> PackedWeight:
    """Quantize experts as an iterator yields them, and concatenate their codes and scales.

    Args:
        experts: dense weights of one expert each, whose sizes are multiples of the block size.
        shape: shape `[experts, .., ..]` of the parameter.
        settings: how to quantize.
        turned: quantize the transpose of each expert.
    """
    settings = settings.resolved()
    parts_by_name: dict[str, Tensor] = {}
    for i, expert in enumerate(experts):
        dense = expert.detach()
        # Nested scales span all experts, so they are computed at the end.
        packed = quantize_weight((dense.mT if turned else dense).unsqueeze(0), replace(settings, double_quant=False))
        for name in _BY_EXPERT:
            part = getattr(packed, name)
            if part is None:
                continue
            if name not in parts_by_name:
                parts_by_name[name] = part.new_empty((shape[0], *part.shape))
            parts_by_name[name][i] = part
    assert parts_by_name
    parts: dict[str, Any] = {name: part.flatten(0, 1) for name, part in parts_by_name.items()}
    weight = packed._replace(**parts, shape=swap_last_dims(shape) if turned else shape, turned=turned)
    return ops.with_nested_scales(weight) if settings.double_quant else weight


def check_shape(weight: PackedWeight, shape: tuple[int, ...], name: str) -> None:
    """Raise a CheckpointError unless the weight `name` has this shape."""
    shape_of_weight = parameter_shape(weight)
    if shape_of_weight != shape:
        raise CheckpointError(f"'{name}' has shape {list(shape_of_weight)}, but the layer needs {list(shape)}")


def check_experts(weight: PackedWeight, name: str) -> None:
    """Raise a CheckpointError if a block of the weight `name` straddles two experts, which no kernel supports."""
    if len(weight.shape) == 3 and weight.shape[1] * weight.shape[2] % weight.blocksize:
        raise CheckpointError(
            f"'{name}' has blocks of {weight.blocksize} values that straddle experts of shape "
            f"{list(weight.shape[1:])}, which is not supported. Quantize the dense model again"
        )


def refuse_non_finite(weight: Tensor, name: str) -> None:
    """Raise a PeftcoreError that names the first NaN or Inf in `weight`."""
    if weight.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(weight)):
        index = (~weight.isfinite()).nonzero()[0].tolist()
        raise PeftcoreError(
            f"'{name}' contains {weight[tuple(index)].item()} at index {index} and cannot be quantized. Repair "
            "the weight, or leave the layer dense: skip=[...]"
        )


def _move_bytes(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of `nn.Module._apply` to the bytes of `tensor`: follow a change of device, but ignore a cast."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    moved = fn(flat)
    if moved is flat:
        return tensor
    if moved.dtype is not torch.uint8 or moved.shape != flat.shape:
        return tensor.to(moved.device)
    return moved.view(tensor.dtype).view(tensor.shape)
