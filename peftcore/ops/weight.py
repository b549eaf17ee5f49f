"""Frozen weights, dense or in 4 bits: a tensor or a `PackedWeight`, passed to operators as two arguments.

    dense       Tensor[] weight = [W [.., out, in]]                   SymInt[] packing = []
    in 4 bits   [codes, absmax, quant_map]                            [blocksize, 0, .., out, in]
    and nested  [.., nested_absmax, nested_quant_map, nested_offset]  [blocksize, nested_blocksize, .., out, in]
                in NVFP4, quant_map has E2M1's values, nested_quant_map E4M3's, and nested_offset is 0
    in MXFP4    [codes, absmax, quant_map], absmax in E8M0            [32, POWERS_OF_TWO, .., out, in]
    in affine4  [codes, absmax, quant_map] or [.., zeros]             [blocksize, AFFINE, .., out, in]

The names are those of bitsandbytes; quant4.py, mxfp4.py, nvfp4.py and affine4.py define the tensors. csrc/weight is the
C++ counterpart.

Each check is implemented twice, with the same message and exception type:

    | checked                            | in compiled kernels             | in references and shape rules      |
    |------------------------------------|---------------------------------|------------------------------------|
    | the weight's tensors and numbers   | `Weight` in csrc/weight         | `weight_from_operands` here        |
    | x, gradient and bias against it    | csrc/weight/linear_arguments.h  | `check_linear`, `check_operand`    |
    | LoRA's factors, samples            | csrc/lora/arguments.h           | lora.py, linear_per_sample.py      |
    | dropout                            | csrc/common/dropout_arguments.h | dropout.py                         |
    | codebooks are finite and sorted    | csrc/quant4/cpu/ops.cpp         | quant4.py, in references only      |
    | a sample's adapter exists          | csrc/lora/cpu; NaN on a GPU     | linear_per_sample.py, references   |

Public functions don't repeat these checks, since the operator runs them on every call. Under `torch.compile` the shape
rule checks while tracing, and the kernel on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_BLOCKSIZE, MAX_BLOCKSIZE = 32, 4096
MIN_NESTED_BLOCKSIZE = 16  # smallest block size with nested scales (NVFP4)
# Values of nested_blocksize that mark other kinds of scales.
POWERS_OF_TWO = -1  # scales are E8M0 bytes
AFFINE = -2  # scales are fp32, fp16 or bf16, and blocks may have zero points
CENTRE = 8  # zero point of affine codes without `zeros`; the codebook's value of a code is code - CENTRE


class PackedWeight(NamedTuple):
    """A weight in 4 bits. It is a named tuple because creating one takes a sixth of the time of a frozen dataclass.

    Args:
        codes: uint8 `[ceil(n / 2), 1]`, two values per byte, the even one in the high nibble.
        absmax: scale of each block, fp32 `[ceil(n / blocksize)]`; uint8 with nested scales or powers of two; fp32, fp16
            or bf16 for affine4.
        quant_map: fp32 `[16]`, the values of the codes.
        shape: `(.., out, in)`; a leading dimension is the number of experts.
        blocksize: values that share a scale, a power of two from 32 to 4096, or 16 with nested scales.
        dtype: dtype of the weight before quantization. quant_type: `nf4`, `fp4`, `mxfp4`, `nvfp4` or `affine4`.
        nested_absmax, nested_quant_map, nested_offset: fp32 `[ceil(blocks / nested_blocksize)]`, `[256]` and `[]`,
            which decode 8-bit scales to fp32, or None.
        nested_blocksize: number of scales that share an entry of nested_absmax. POWERS_OF_TWO marks E8M0 scales, and
            AFFINE marks affine4 scales.
        turned: whether the weight is the transpose of a parameter `[experts, in, out]`. Operators ignore this flag.
        zeros: zero point of each affine4 block, uint8 or fp32 `[blocks]`; None means CENTRE for all blocks.
        permutation: int64 `[in]`, for a matrix whose column j of codes belongs to input `permutation[j]`, or None.
            Operators ignore it; the public functions permute x (`permute_inputs`).
    """

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    shape: tuple[int, ...]
    blocksize: int = 64
    dtype: torch.dtype = torch.float32
    quant_type: str = "nf4"
    nested_absmax: Tensor | None = None
    nested_quant_map: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 256
    turned: bool = False
    zeros: Tensor | None = None
    permutation: Tensor | None = None

    @property
    def double_quant(self) -> bool:
        """Whether the scales are in 8 bits."""
        return self.nested_absmax is not None

    def operands(self) -> tuple[list[Tensor], list[int]]:
        """Return the two arguments of an operator.

        Raises:
            ValueError: some, but not all tensors of nested scales are present.
        """
        absmax, quant_map, offset = self.nested_absmax, self.nested_quant_map, self.nested_offset
        if absmax is None and quant_map is None and offset is None:
            tensors = [self.codes, self.absmax, self.quant_map]
            if self.zeros is not None:
                tensors.append(self.zeros)
            return tensors, [self.blocksize, min(self.nested_blocksize, 0), *self.shape]
        if absmax is None or quant_map is None or offset is None:
            tensors_by_name = {"nested_absmax": absmax, "nested_quant_map": quant_map, "nested_offset": offset}
            found_shape = ", ".join(
                f"no {name}" if tensor is None else name for name, tensor in tensors_by_name.items()
            )
            raise ValueError(
                f"PackedWeight: nested scales need {', '.join(tensors_by_name)} together, found {found_shape}"
            )
        tensors = [self.codes, self.absmax, self.quant_map, absmax, quant_map, offset]
        return tensors, [self.blocksize, self.nested_blocksize, *self.shape]

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the weight on another device."""
        tensors: dict[str, Any] = {name: t.to(device) for name, t in self._asdict().items() if isinstance(t, Tensor)}
        return self._replace(**tensors)

    def scales(self) -> Tensor:
        """Return the fp32 scales, one per block: `absmax`, decoded if it is stored in 8 bits."""
        absmax, nested = self.absmax.reshape(-1), self.nested_absmax
        if self.nested_blocksize == POWERS_OF_TWO:
            return powers_of_two(absmax)
        if self.nested_blocksize == AFFINE:
            return absmax.float()
        if nested is None or self.nested_quant_map is None or self.nested_offset is None:
            return absmax
        per_block = nested.reshape(-1).repeat_interleave(self.nested_blocksize)[: absmax.numel()]
        return self.nested_quant_map.reshape(-1)[absmax.int()] * per_block + self.nested_offset.reshape(())

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight, not permuted: the reference of `dequantize_4bit` in PyTorch."""
        count, codes = math.prod(self.shape), self.codes.reshape(-1)
        values = self.quant_map.reshape(16)[torch.stack([codes >> 4, codes & 15], 1).flatten()[:count].int()]
        if self.zeros is not None:
            values = values - (self.zeros.reshape(-1).float() - CENTRE).repeat_interleave(self.blocksize)[:count]
        return (values * self.scales().repeat_interleave(self.blocksize)[:count]).to(dtype).reshape(self.shape)

    def rows_that_begin_blocks(self) -> int:
        """Return n such that every n-th row begins on a block boundary (of scales as well, if they are nested)."""
        block = self.blocksize * (self.nested_blocksize if self.double_quant else 1)
        return block // math.gcd(self.shape[-1], block)

    def rows(self, first: int, last: int) -> PackedWeight:
        """Return a view of rows [first, last) of a matrix. `first` must be a multiple of `rows_that_begin_blocks`."""
        columns = self.shape[1]
        begin, end = first * columns, last * columns
        blocks, nested = slice(begin // self.blocksize, -(-end // self.blocksize)), self.nested_absmax
        if nested is not None:
            step = self.nested_blocksize
            nested = nested.reshape(-1)[blocks.start // step : -(-blocks.stop // step)]
        return self._replace(
            codes=self.codes.reshape(-1)[begin // 2 : (end + 1) // 2],
            absmax=self.absmax.reshape(-1)[blocks],
            nested_absmax=nested,
            shape=(last - first, columns),
            zeros=None if self.zeros is None else self.zeros.reshape(-1)[blocks],
        )

    def expert(self, index: int) -> PackedWeight:
        """Return a view `[1, out, in]` of one expert of `[experts, out, in]`; an expert must be whole blocks."""
        size = math.prod(self.shape[1:])
        begin, end = (i * size // self.blocksize for i in (index, index + 1))
        absmax, nested, step = self.absmax.reshape(-1)[begin:end], self.nested_absmax, self.nested_blocksize
        expert = self._replace(
            codes=self.codes.reshape(-1)[index * size // 2 : (index + 1) * size // 2],
            absmax=absmax,
            shape=(1, *self.shape[1:]),
            zeros=None if self.zeros is None else self.zeros.reshape(-1)[begin:end],
        )
        if nested is None or self.nested_quant_map is None or self.nested_offset is None:
            return expert
        if begin % step == 0:
            return expert._replace(nested_absmax=nested.reshape(-1)[begin // step : -(-end // step)])
        per_block = nested.reshape(-1)[torch.arange(begin, end, device=nested.device) // step]
        scales = self.nested_quant_map.reshape(-1)[absmax.int()] * per_block + self.nested_offset.reshape(())
        return expert._replace(absmax=scales, nested_absmax=None, nested_quant_map=None, nested_offset=None)


def powers_of_two(e: Tensor) -> Tensor:
    """Decode E8M0 bytes to fp32: exactly 2^(e - 127), and NaN for 255."""
    # 2^-127 is subnormal in fp32, so e = 0 needs bits of its own.
    bits = (e.int() << 23).masked_fill(e == 0, 1 << 22).masked_fill(e == 255, 0x7FC00000)
    return bits.view(torch.float32)


# --- checks: the same conditions, messages and exception types as in csrc/weight -------------------------------------


def require(condition: bool, op: str, message: str) -> None:
    """Raise a ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_dtype(dtype: torch.dtype, op: str) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: only float32, float16 and bfloat16 are supported, found {dtype}")


def check_blocksize(blocksize: int, op: str, name: str = "blocksize", least: int = MIN_BLOCKSIZE) -> None:
    valid = least <= blocksize <= MAX_BLOCKSIZE and blocksize & (blocksize - 1) == 0
    require(valid, op, f"{name} must be a power of two from {least} to {MAX_BLOCKSIZE}, found {blocksize}")


def check_tensor(t: Tensor, dtype: torch.dtype, device: torch.device, op: str, name: str) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, found {t.dtype}")
    require(t.device == device, op, f"{name} must be on {device}, found {t.device}")


def check_numel(t: Tensor, expected: int, op: str, name: str, reason: str) -> None:
    requirement = f"{name} must hold {expected} elements ({reason})"
    require(t.numel() == expected, op, f"{requirement}, found {t.numel()} of shape {list(t.shape)}")


def check_quant_map(quant_map: Tensor, entries: int, device: torch.device, op: str, name: str = "quant_map") -> None:
    check_tensor(quant_map, torch.float32, device, op, name)
    check_numel(quant_map, entries, op, name, "one value a code")


def check_like(t: Tensor, x: Tensor, op: str, name: str) -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must be {x.dtype} like x, found {t.dtype}")
    require(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")


def check_strided(t: Tensor, op: str, name: str) -> None:
    require(t.layout is torch.strided, op, f"{name} must be strided, found {t.layout}")


def check_gradient(grad: Tensor, x: Tensor, op: str) -> None:
    """Check the gradient of an output that has x's shape, dtype and device."""
    check_like(grad, x, op, "grad")
    check_strided(grad, op, "grad")
    require(grad.shape == x.shape, op, f"grad must be {list(x.shape)} like x, found {list(grad.shape)}")


def weight_from_operands(tensors: Sequence[Tensor], packing: Sequence[int], op: str) -> Tensor | PackedWeight:
    """Check the two weight arguments of an operator against each other, and return the weight that they describe.

    Args:
        tensors, packing: the two arguments, as listed in the module's docstring.
        op: name of the operator, for errors.

    Raises:
        TypeError: a tensor has the wrong dtype. ValueError: a tensor or a number does not fit the others.
    """
    if not packing:
        require(len(tensors) == 1, op, f"a dense weight is 1 tensor (without packing), found {len(tensors)}")
        return tensors[0]
    _check_counts(tensors, packing, op)
    codes, absmax, quant_map, *extra = tensors
    blocksize, nested_blocksize, shape = int(packing[0]), int(packing[1]), tuple(packing[2:])
    weight = PackedWeight(codes, absmax, quant_map, shape, blocksize)
    if len(extra) == 3:
        return _with_nested_scales(weight, extra, nested_blocksize, op)
    if nested_blocksize == AFFINE:
        return _as_affine4(weight, extra, op)
    require(not extra, op, f"zero points need affine codes, found packing {list(packing)}")
    if nested_blocksize == POWERS_OF_TWO:
        return _as_mxfp4(weight, op)
    _check_common_parts(weight, torch.float32, op)
    requirement = "nested_blocksize must be 0 without nested scales"
    require(nested_blocksize == 0, op, f"{requirement}, found {nested_blocksize}")
    return weight


def _check_counts(tensors: Sequence[Tensor], packing: Sequence[int], op: str) -> None:
    requirement = "a weight in 4 bits is 3 tensors, 4 with zero points, or 6 with nested scales"
    require(len(tensors) in (3, 4, 6), op, f"{requirement}, found {len(tensors)}")
    requirement = "packing must be [blocksize, nested_blocksize, shape..]"
    require(len(packing) >= 2, op, f"{requirement}, found {list(packing)}")


def _block_count(weight: PackedWeight) -> int:
    return -(-math.prod(weight.shape) // weight.blocksize)


def _check_common_parts(
    weight: PackedWeight, scale_dtype: torch.dtype, op: str, min_blocksize: int = MIN_BLOCKSIZE
) -> None:
    """Check the sizes and tensors that every weight format has."""
    check_blocksize(weight.blocksize, op, least=min_blocksize)
    for size in weight.shape:
        require(size >= 0, op, f"shape must not be negative, found {list(weight.shape)}")
    device = weight.codes.device
    check_tensor(weight.codes, torch.uint8, device, op, "codes")
    check_numel(weight.codes, (math.prod(weight.shape) + 1) // 2, op, "codes", "two values a byte")
    check_tensor(weight.absmax, scale_dtype, device, op, "absmax")
    check_numel(weight.absmax, _block_count(weight), op, "absmax", "one a block")
    check_quant_map(weight.quant_map, 16, device, op)


def _check_whole_blocks(weight: PackedWeight, op: str) -> None:
    columns = weight.shape[-1] if weight.shape else 1
    requirement = f"rows must be whole blocks of {weight.blocksize} values in this format"
    require(columns % weight.blocksize == 0, op, f"{requirement}, found {columns} columns")


def _as_mxfp4(weight: PackedWeight, op: str) -> PackedWeight:
    _check_common_parts(weight, torch.uint8, op)
    _check_whole_blocks(weight, op)
    return weight._replace(quant_type="mxfp4", nested_blocksize=POWERS_OF_TWO)


def _as_affine4(weight: PackedWeight, extra: Sequence[Tensor], op: str) -> PackedWeight:
    scale_dtype = weight.absmax.dtype if weight.absmax.dtype in DTYPES else torch.float32
    _check_common_parts(weight, scale_dtype, op)
    _check_whole_blocks(weight, op)
    weight = weight._replace(quant_type="affine4", nested_blocksize=AFFINE)
    if not extra:
        return weight
    (zeros,) = extra
    dtype = torch.uint8 if zeros.dtype is torch.uint8 else torch.float32
    check_tensor(zeros, dtype, weight.codes.device, op, "zeros")
    check_numel(zeros, _block_count(weight), op, "zeros", "one a block")
    return weight._replace(zeros=zeros)


def _with_nested_scales(weight: PackedWeight, extra: Sequence[Tensor], blocksize: int, op: str) -> PackedWeight:
    _check_common_parts(weight, torch.uint8, op, min_blocksize=MIN_NESTED_BLOCKSIZE)
    if weight.blocksize < MIN_BLOCKSIZE:
        _check_whole_blocks(weight, op)
    absmax, quant_map, offset = extra
    device = weight.codes.device
    check_blocksize(blocksize, op, "nested_blocksize")
    check_tensor(absmax, torch.float32, device, op, "nested_absmax")
    check_numel(absmax, -(-_block_count(weight) // blocksize), op, "nested_absmax", "one a block of scales")
    check_tensor(offset, torch.float32, device, op, "nested_offset")
    check_numel(offset, 1, op, "nested_offset", "one for all scales")
    check_quant_map(quant_map, 256, device, op, "nested_quant_map")
    return weight._replace(
        nested_absmax=absmax, nested_quant_map=quant_map, nested_offset=offset, nested_blocksize=blocksize
    )


def packed_weight_from_operands(tensors: Sequence[Tensor], packing: Sequence[int], op: str) -> PackedWeight:
    """Return the 4-bit weight as `weight_from_operands` does. Raises ValueError for a dense weight."""
    weight = weight_from_operands(tensors, packing, op)
    if isinstance(weight, Tensor):
        raise ValueError(f"{op}: the weight must be in 4 bits, found a dense one of shape {list(weight.shape)}")
    return weight


def check_operand(weight: Tensor | PackedWeight, t: Tensor, name: str, is_gradient: bool, op: str) -> None:
    """Check W `[out, in]` against `t`: x `[.., in]`, or a gradient `[.., out]`. float64 needs a dense W."""
    dense = isinstance(weight, Tensor)
    if not (dense and t.dtype is torch.float64):
        check_dtype(t.dtype, op)
    require(len(weight.shape) == 2, op, f"weight must be [out, in], found {list(weight.shape)}")
    if dense and weight.dtype != t.dtype:
        raise TypeError(f"{op}: weight must be {t.dtype} like {name}, found {weight.dtype}")
    device = weight.device if isinstance(weight, Tensor) else weight.codes.device
    require(device == t.device, op, f"weight must be on {t.device} like {name}, found {device}")
    require(t.dim() > 0, op, f"{name} must have at least one dimension, found a scalar")
    features = weight.shape[0 if is_gradient else 1]
    requirement = f"{name} must be [.., {features}] for a weight {list(weight.shape)}"
    require(t.shape[-1] == features, op, f"{requirement}, found {list(t.shape)}")


def check_linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, op: str) -> None:
    """Check x `[.., in]`, W `[out, in]` and its bias `[out]` against each other."""
    check_operand(weight, x, "x", False, op)
    if bias is not None:
        rows = weight.shape[0]
        require(bias.shape == (rows,), op, f"bias must be [{rows}], found {list(bias.shape)}")
        check_like(bias, x, op, "bias")
