"""The plain structs that launchers take, as ctypes. They keep the tensors alive whose addresses they hold."""

from ctypes import POINTER, Structure, byref, c_bool, c_float, c_int, c_int64, c_uint32, c_void_p

import torch

from peftcore.ops.weight import AFFINE, POWERS_OF_TWO

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def address(t):
    return None if t is None else t.data_ptr()


class WeightView(Structure):
    """csrc/weight/view.h"""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("dense", c_void_p),
        ("itemsize", c_int),
        ("codes", c_void_p),
        ("absmax", c_void_p),
        ("quant_map", c_void_p),
        ("shift", c_int),
        ("nested_absmax", c_void_p),
        ("nested_quant_map", c_void_p),
        ("nested_offset", c_void_p),
        ("nested_shift", c_int),
        ("first_block", c_int64),
        ("scales", c_int),
        ("scale_dtype", c_int),
        ("zeros", c_void_p),
        ("whole_zeros", c_bool),
    ]  # fmt: skip

    def __init__(self, weight):
        """A `PackedWeight`, or a dense one."""
        *leading, columns = weight.shape or (1,)
        super().__init__(rows=torch.Size(leading).numel(), columns=columns)
        self.kept = weight
        if isinstance(weight, torch.Tensor):
            self.dense, self.itemsize = weight.data_ptr(), weight.element_size()
            return
        for name in ("codes", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset"):
            setattr(self, name, address(getattr(weight, name)))
        self.shift = weight.blocksize.bit_length() - 1
        self.nested_shift = weight.nested_blocksize.bit_length() - 1 if weight.double_quant else 0
        self.scales = {POWERS_OF_TWO: 2, AFFINE: 3}.get(weight.nested_blocksize, int(weight.double_quant))
        if weight.nested_blocksize == AFFINE:
            self.scale_dtype = DTYPES.index(weight.absmax.dtype)
            self.zeros = address(weight.zeros)
            self.whole_zeros = weight.zeros is None or weight.zeros.dtype == torch.uint8

    def expert(self, library, index):
        """Return a view of one expert of a weight `[experts, out, in]`."""
        expert = WeightView(self.kept)
        library.expert_of(byref(self), c_int64(index), c_int64(self.kept.shape[0]), byref(expert))
        return expert


class Wide(Structure):
    """csrc/lora/cuda/lora_cuda.h: x, dy, or what is written, `[samples, rows, columns]` or a matrix."""

    _fields_ = [
        ("values", c_void_p),
        ("dtype", c_int),
        ("samples", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
    ]  # fmt: skip

    def __init__(self, t):
        samples, rows, columns = t.shape if t.dim() == 3 else (1, *t.shape)
        super().__init__(t.data_ptr(), DTYPES.index(t.dtype), samples, rows, columns)
        self.kept = t


class Factors(Structure):
    """csrc/lora/cuda/lora_cuda.h: of some adapters, and each sample's number."""

    _fields_ = [
        ("values", POINTER(c_void_p)),
        ("ranks", POINTER(c_int)),
        ("scales", POINTER(c_float)),
        ("count", c_int),
        ("stride", c_int),
        ("index", c_void_p),
    ]  # fmt: skip

    def __init__(self, factors, rank_dimension, stride, scales=None, index=None):
        count, ranks = len(factors), [t.shape[rank_dimension] for t in factors]
        values = (c_void_p * count)(*(t.data_ptr() for t in factors))
        super().__init__(values, (c_int * count)(*ranks), None, count, stride, address(index))
        if scales is not None:
            self.scales = (c_float * count)(*scales)
        self.kept = factors, index


class OneLaunch(Structure):
    """csrc/lora/cuda/lora_cuda.h: LoRA over a base in 4 bits."""

    _fields_ = [
        ("x", c_void_p),
        ("dtype", c_int),
        ("batch", c_int),
        ("bias", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("a_dtype", c_int),
        ("b_dtype", c_int),
        ("rank", c_int),
        ("scale", c_float),
        ("s", c_void_p),
        ("y", c_void_p),
    ]  # fmt: skip

    def __init__(self, x, bias, a, b, scale, s, y):
        super().__init__(address(x), DTYPES.index(x.dtype), len(x), address(bias), address(a), address(b))
        self.a_dtype, self.b_dtype, self.rank = DTYPES.index(a.dtype), DTYPES.index(b.dtype), len(a)
        self.scale, self.s, self.y = scale, address(s), address(y)
        self.kept = x, bias, a, b, s, y


class FactorCopy(Structure):
    """csrc/lora/cuda/lora_cuda.h: a factor, and where it goes in fp32."""

    _fields_ = [
        ("source", c_void_p),
        ("dtype", c_int),
        ("rows", c_int64),
        ("columns", c_int64),
        ("transposed", c_bool),
        ("target", c_void_p),
    ]  # fmt: skip

    def __init__(self, source, transposed, target):
        super().__init__(source.data_ptr(), DTYPES.index(source.dtype), *source.shape, transposed, target.data_ptr())
        self.kept = source, target


class Dropout(Structure):
    """csrc/common/dropout.h"""

    _fields_ = [("threshold", c_uint32), ("key0", c_uint32), ("key1", c_uint32), ("seed", c_void_p)]


class Groups(Structure):
    """csrc/grouped/cuda/grouped_cuda.h: where rows of experts end."""

    _fields_ = [("offsets", c_void_p), ("experts", c_int64), ("rows", c_int64)]

    def __init__(self, offsets, rows):
        super().__init__(offsets.data_ptr(), len(offsets), rows)
        self.kept = offsets


class GroupedSkinny(Structure):
    """csrc/grouped/cuda/grouped_cuda.h, Skinny"""

    _fields_ = [
        ("groups", Groups),
        ("dtype", c_int),
        ("wide", c_void_p),
        ("out", c_void_p),
        ("inner", c_int64),
        ("columns", c_int64),
        ("weight", WeightView),
        ("bias", c_void_p),
        ("thin", c_void_p),
        ("factor", c_void_p),
        ("rank", c_int),
    ]  # fmt: skip


class GroupedUp(Structure):
    """csrc/grouped/cuda/grouped_cuda.h, Up"""

    _fields_ = [
        ("groups", Groups),
        ("dtype", c_int),
        ("columns", c_int64),
        ("bias", c_void_p),
        ("thin", c_void_p),
        ("factor", c_void_p),
        ("rank", c_int),
        ("dropout", Dropout),
        ("out", c_void_p),
    ]  # fmt: skip


class GroupedDown(Structure):
    """csrc/grouped/cuda/grouped_cuda.h, Down"""

    _fields_ = [
        ("groups", Groups),
        ("dtype", c_int),
        ("wide", c_void_p),
        ("columns", c_int64),
        ("factor", c_void_p),
        ("across", c_bool),
        ("rank", c_int),
        ("scale", c_float),
        ("dropout", Dropout),
        ("out", c_void_p),
    ]  # fmt: skip


class GroupedReduce(Structure):
    """csrc/grouped/cuda/grouped_cuda.h, Reduce"""

    _fields_ = [
        ("groups", Groups),
        ("dtype", c_int),
        ("wide", c_void_p),
        ("thin", c_void_p),
        ("columns", c_int64),
        ("rank", c_int),
        ("dropout", Dropout),
        ("out_dtype", c_int),
        ("transposed", c_bool),
        ("out", c_void_p),
    ]  # fmt: skip
