"""Linear layer with a 4-bit weight: y = x Wᵀ + b, with W dequantized on the fly (`ops.linear_4bit`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.plugin import sharded
from peftcore.quantization.formats import FourBitSettings, quantize_weight
from peftcore.quantization.parameters import PackedParameters, double_quant_text


class QuantizedLinear(PackedParameters, nn.Linear):
    """Linear layer with a 4-bit weight, created by `peftcore.quantize` or filled by `load_state_dict`.

    Args:
        compute_dtype: dtype of the product. The input is cast to it and the output is cast back. None means the input's
            dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        weight = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self.bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear declares it as Tensor, though it may be None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        settings = FourBitSettings(quant_type=quant_type, double_quant=double_quant, blocksize=blocksize)
        self.set_packed_parameter("weight", quantize_weight(weight, settings))

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is quantized; False after a merge has replaced it with a dense weight."""
        return self.weight.dtype is torch.uint8

    @property
    def packed(self) -> PackedWeight:
        """Return the 4-bit weight, without copying."""
        # This runs for every generated token, where `nn.Module.__getattr__` and keyword arguments are measurably slow.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        packing = self.packings["weight"]
        return PackedWeight(
            parameters["weight"],
            buffers["absmax"],
            buffers["quant_map"],
            packing.shape,
            packing.blocksize,
            packing.dtype,
            packing.quant_type,
            buffers["nested_absmax"],
            buffers["nested_quant_map"],
            buffers["nested_offset"],
            packing.nested_blocksize,
            False,
            buffers["zeros"],
            buffers["permutation"],
        )

    @property
    def quant_type(self) -> str:
        """Name of the format."""
        return self.packings["weight"].quant_type

    @property
    def blocksize(self) -> int:
        """Number of weights that share a scale."""
        return self.packings["weight"].blocksize

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight `[out, in]`, by default in its original dtype."""
        return ops.dequantize_4bit(self.packed, dtype)

    def dense_parameter(self, dtype: torch.dtype | None) -> nn.Parameter:
        """Return the weight as a frozen dense parameter, by default in its original dtype."""
        return nn.Parameter(self.dequantized(dtype) if self.is_quantized else self.weight.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._parameters  # see `packed`
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401  # looked up when needed
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  # looked up when needed
        if weight.dtype is not torch.uint8:
            bias = None if bias is None else bias.to(weight.dtype)
            return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        if not x.is_floating_point():
            raise PeftcoreError(
                f"a 4-bit layer [{self.out_features}, {self.in_features}] got an input in {x.dtype}, because the "
                "model casts inputs to the dtype of the packed weight. Leave the layer dense: add its path to "
                "`skip` of peftcore.quantize"
            )
        if sharded.is_dtensor(x):
            raise PeftcoreError(
                "a 4-bit layer was sharded after it was quantized, which splits its blocks. Call "
                "peftcore.quantize(model) again to assign whole blocks to each rank"
            )
        dtype = self.compute_dtype
        if dtype is None or dtype is x.dtype:
            return ops.linear_4bit(x, self.packed, bias)
        return ops.linear_4bit(x.to(dtype), self.packed, bias).to(x.dtype)

    def linear_operands(self, x: Tensor) -> tuple[PackedWeight, Tensor | None] | None:
        """Return the (weight, bias) that an adapter may multiply itself; see `peftcore.plugin.adapter.Base`."""
        parameters: dict[str, Any] = self._parameters  # see `packed`
        if parameters["weight"].dtype is not torch.uint8 or self.compute_dtype not in (None, x.dtype):
            return None
        if not x.is_floating_point():  # `forward` raises
            return None
        return self.packed, parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  # looked up when needed

    def extra_repr(self) -> str:
        storage = self.quant_type if self.is_quantized else "dense"
        double = double_quant_text(self.quant_type, self._buffers["nested_absmax"])
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, {storage}, blocksize={self.blocksize}{double}"
