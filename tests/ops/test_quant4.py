"""4-bit operators against bitsandbytes, a float64 computation, and each other at every SIMD level."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.operands import at_thresholds

from peftcore import ops
from peftcore.ops import PackedWeight
from peftcore.ops.quant4 import Dequantize4bit, Quantize4bit, QuantizeAbsmax

LEVELS = ["reference", *(ops.extension.cpu_levels() if ops.extension else [])]
if torch.cuda.is_available():
    LEVELS.append("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
CODES = {"nf4": ops.NF4, "fp4": ops.FP4}
examples = settings(max_examples=40, deadline=None, derandomize=True)


def on_cuda(operator):
    """Runs an operator on the GPU with arguments and results on the CPU."""

    def move(value, device):
        if isinstance(value, list):
            return [move(v, device) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def call(*args):
        result = operator(*(move(arg, "cuda") for arg in args))
        return move(result, "cpu") if isinstance(result, torch.Tensor) else tuple(move(r, "cpu") for r in result)

    return call


def by_reference(call):
    return lambda *args: call(*args).compute()


class at_level:
    """The operators at one SIMD level, on a GPU, or their references."""

    def __init__(self, level):
        self.level = level

    def __enter__(self):
        if self.level == "reference":
            return tuple(map(by_reference, (Quantize4bit, Dequantize4bit, QuantizeAbsmax)))
        namespace = torch.ops.peftcore
        operators = namespace.quantize_4bit, namespace.dequantize_4bit, namespace.quantize_absmax
        if self.level == "cuda":
            return tuple(map(on_cuda, operators))
        self.before = ops.extension.cpu_level()
        ops.extension.set_cpu_level(self.level)
        return operators

    def __exit__(self, *_):
        if self.level not in ("reference", "cuda"):
            ops.extension.set_cpu_level(self.before)


quantize_reference, dequantize_reference = map(by_reference, (Quantize4bit, Dequantize4bit))


def data(kind, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    x = {
        "normal": normal,
        "heavy": (normal * torch.exp(3 * torch.randn(shape, generator=generator))).clamp(-6e4, 6e4),
        "tiny": normal * 1e-38,
        "constant": torch.full(shape, -1.75),
        "zero": torch.zeros(shape),
        "integers": torch.randint(-12, 13, shape, generator=generator).float(),
        "sparse": normal * (torch.rand(shape, generator=generator) < 0.02),
    }[kind]
    return x.to(dtype)


tensors = st.builds(
    data,
    st.sampled_from(["normal", "heavy", "tiny", "constant", "zero", "integers", "sparse"]),
    st.lists(st.integers(1, 40), max_size=2).flatmap(lambda lead: st.integers(1, 130).map(lambda k: (*lead, k))),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)


def same(a, b):
    """Equal in dtype, shape and bits, but for the sign of zero and the payload of NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_but_subnormal(a, b):
    """As `same`, where bitsandbytes may have flushed a subnormal bf16 to zero (its AVX-512 instruction does)."""
    tiny = torch.finfo(a.dtype).smallest_normal
    flush = [torch.where(t.abs() <= tiny, 0, t) if t.dtype == torch.bfloat16 else t for t in (a, b)]
    return same(*flush)


def bits(t):
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


# --- bitsandbytes and float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@examples
@given(x=tensors, blocksize=st.sampled_from(BLOCKSIZES), name=st.sampled_from(["nf4", "fp4"]))
def test_quantize_equals_bitsandbytes(level, x, blocksize, name, bnb):
    with at_level(level) as (quantize, _, _):
        packed, absmax = quantize(x, CODES[name], blocksize)
    wanted, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=name)
    assert torch.equal(packed, wanted.reshape(-1, 1))
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("level", LEVELS)
def test_a_partial_block_is_divided_by_its_scale(level, bnb):
    """As bitsandbytes does. Whole blocks are multiplied by the reciprocal, and the code of some value differs."""
    x = at_thresholds(ops.NF4)
    with at_level(level) as (quantize, _, _):
        packed, _ = quantize(x, ops.NF4, 64)
        whole, _ = quantize(torch.cat([x, torch.zeros(64 - len(x))]), ops.NF4, 64)
    assert torch.equal(packed, bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")[0].reshape(-1, 1))
    assert not torch.equal(packed, whole[: len(packed)])


@pytest.mark.parametrize("level", LEVELS)
@examples
@given(
    x=tensors,
    blocksize=st.sampled_from([32, 64, 128, 256, 512, 1024]),  # above, bitsandbytes compiles a kernel of its own
    name=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantize_equals_bitsandbytes(level, x, blocksize, name, dtype, bnb):
    x = x.flatten()[: x.numel() // 2 * 2]
    wanted_packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=name)
    state.dtype = dtype
    wanted = bnb.dequantize_4bit(wanted_packed.reshape(-1, 1), state).reshape(x.shape)
    with at_level(level) as (_, dequantize, _):
        found = dequantize([wanted_packed, state.absmax, CODES[name]], [blocksize, 0, *x.shape], dtype)
    assert same_but_subnormal(found, wanted)


@pytest.mark.parametrize("level", LEVELS)
@examples
@given(x=tensors, blocksize=st.sampled_from(BLOCKSIZES), name=st.sampled_from(["nf4", "fp4"]))
def test_round_trip_in_float64(level, x, blocksize, name):
    code = CODES[name]
    with at_level(level) as (quantize, dequantize, _):
        packed, absmax = quantize(x, code, blocksize)
        weight = [packed, absmax, code], [blocksize, 0, *x.shape]
        values = {dtype: dequantize(*weight, dtype) for dtype in DTYPES}
    exact = x.double().flatten()
    scale = absmax.double().repeat_interleave(blocksize)[: x.numel()]
    assert torch.equal(absmax.double()[:-1], torch.stack([b.abs().max() for b in exact.split(blocksize)])[:-1])
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: x.numel()].long()
    # No entry is nearer than the chosen one, but for the rounding of x / absmax.
    candidates = code.double() * scale.unsqueeze(1)
    error = (exact.unsqueeze(1) - candidates).abs()
    chosen = error.gather(1, codes.unsqueeze(1)).squeeze(1)
    representable = scale > 1e-37  # below, the reciprocal of 1e-38 stands in for the scale's
    assert (chosen <= error.amin(1) + 1e-6 * scale)[representable].all()
    product = candidates.gather(1, codes.unsqueeze(1)).squeeze(1)
    for dtype, value in values.items():
        info = torch.finfo(dtype)
        half_ulp = product.abs() * info.eps / 2 * (1 + 2**-7) + info.smallest_normal * info.eps
        finite = product.abs() < info.max
        assert ((value.double().flatten() - product).abs() <= half_ulp)[finite].all()


@pytest.mark.parametrize("level", LEVELS[1:])
@examples
@given(
    x=tensors,
    blocksize=st.sampled_from(BLOCKSIZES),
    offset=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    transpose=st.booleans(),
)
def test_levels_give_equal_bits(level, x, blocksize, offset, dtype, transpose):
    x = x.reshape(-1)[offset:]
    if transpose and x.numel() % 6 == 0:
        x = x.reshape(6, -1).t()
    packed, absmax = quantize_reference(x, ops.FP4, blocksize)
    weight = PackedWeight(packed, absmax, ops.FP4, tuple(x.shape), blocksize)
    value = weight.values(dtype)
    with at_level(level) as (quantize, dequantize, _):
        found_packed, found_absmax = quantize(x, ops.FP4, blocksize)
        found = dequantize(*weight.operands(), dtype)
        memory = torch.zeros(x.numel() + 8, dtype=dtype)
        shifted = memory[offset : offset + x.numel()].view(x.shape)
        ops.dequantize_4bit(weight, out=shifted)
    assert torch.equal(packed, found_packed) and torch.equal(bits(absmax), bits(found_absmax))
    assert torch.equal(bits(value), bits(found)) and torch.equal(bits(value), bits(shifted.contiguous()))
    assert not memory[:offset].any() and not memory[offset + x.numel() :].any()


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_bypass_the_cache_with_the_same_bits(level, dtype):
    count = 2**27 // dtype.itemsize + 4099  # from 128 MiB
    x = data("heavy", (64 * 1009,), torch.bfloat16, 0).repeat(-(-count // (64 * 1009)))[:count]
    with at_level(level) as (quantize, dequantize, _):
        packed, absmax = quantize(x, ops.NF4, 64)
        value = dequantize([packed, absmax, ops.NF4], [64, 0, count], dtype)
    part = 64 * 1001
    head = dequantize_reference([packed[: part // 2], absmax[:1001], ops.NF4], [64, 0, part], dtype)
    assert torch.equal(bits(value[:part]), bits(head))
    tail = x[x.numel() // part * part :]
    tail_packed, tail_absmax = quantize_reference(tail, ops.NF4, 64)
    assert torch.equal(packed[-tail_packed.numel() :], tail_packed)
    wanted = dequantize_reference([tail_packed, tail_absmax, ops.NF4], [64, 0, *tail.shape], dtype)
    assert torch.equal(bits(value[-tail.numel() :]), bits(wanted))


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_is_read_and_written_right(level):
    with at_level(level) as (quantize, dequantize, _):
        for dtype in (torch.float16, torch.bfloat16):
            every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
            finite = every[every.isfinite()]
            packed, absmax = quantize(finite, ops.NF4, 32)
            as_float = quantize(finite.float(), ops.NF4, 32)
            assert torch.equal(packed, as_float[0]) and torch.equal(absmax, as_float[1])
            # One block for each scale: entry 1.0 of the codebook gives the scale itself, rounded.
            scale = torch.cat([finite.float(), finite.float() * (1 + 2**-9), finite.float() * (1 + 2**-12)])
            ones = torch.full((scale.numel() * 16,), 0xFF, dtype=torch.uint8)
            values = dequantize([ones, scale, ops.NF4], [32, 0, scale.numel(), 32], dtype)
            assert same(values, scale.to(dtype).unsqueeze(1).expand(-1, 32))


def test_unsorted_and_repeated_codebooks():
    code = ops.NF4.flip(0).clone()
    code[3] = code[4]
    x = data("normal", (7, 64), torch.float32, 3)
    packed, absmax = torch.ops.peftcore.quantize_4bit(x, code, 64)
    wanted = quantize_reference(x, code, 64)
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])
    assert not ((packed >> 4 == 4) | (packed & 15 == 4)).any() or code[4] == code[3]


# --- double quantization ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@examples
@given(x=tensors, dtype=st.sampled_from(DTYPES), nested_blocksize=st.sampled_from([32, 256]))
def test_reads_bitsandbytes_nested_scales(level, x, dtype, nested_blocksize, bnb):
    x = x.flatten()[: x.numel() // 2 * 2]
    packed, state = bnb.quantize_4bit(x, blocksize=32, quant_type="nf4")
    offset = state.absmax.mean()
    quantized, state2 = bnb.quantize_blockwise(state.absmax - offset, blocksize=nested_blocksize)
    state.absmax, state.offset, state.state2, state.nested, state.dtype = quantized, offset, state2, True, dtype
    wanted = bnb.dequantize_4bit(packed.reshape(-1, 1), state).reshape(x.shape)
    nested = {"nested_absmax": state2.absmax, "nested_quant_map": state2.code, "nested_offset": offset}
    weight = PackedWeight(packed, quantized, ops.NF4, x.shape, 32, **nested, nested_blocksize=nested_blocksize)
    with at_level(level) as (_, dequantize, _):
        found = dequantize(*weight.operands(), dtype)
        assert same_but_subnormal(found, wanted)
        assert same(found, dequantize([packed, weight.scales(), ops.NF4], [32, 0, *x.shape], dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_scales_take_the_nearest_of_256(level, bnb):
    absmax = data("heavy", (5003,), torch.float32, 5).abs()
    with at_level(level) as (_, _, quantize_absmax):
        quantized, nested_absmax, offset = quantize_absmax(absmax, ops.DYNAMIC8, 256)
    assert torch.equal(offset, absmax.mean())
    centred = absmax - offset
    assert torch.equal(nested_absmax, torch.stack([b.abs().max() for b in centred.split(256)]))
    unit = centred.double() / nested_absmax.double().repeat_interleave(256)[: absmax.numel()]
    distance = (unit.unsqueeze(1) - ops.DYNAMIC8.double()).abs()
    chosen = distance.gather(1, quantized.long().unsqueeze(1)).squeeze(1)
    assert (chosen <= distance.amin(1) + 1e-7).all()
    theirs, state = bnb.quantize_blockwise(centred, blocksize=256)
    assert torch.equal(state.absmax, nested_absmax)
    # Its table of 65536 entries misses the nearest code now and then, ours never.
    assert (theirs != quantized).float().mean() < 0.03
    their_error = distance.gather(1, theirs.long().unsqueeze(1)).squeeze(1)
    assert (chosen <= their_error + 1e-7).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_equal_scales_survive_double_quantization(level, kind):
    absmax = data(kind, (777,), torch.float32, 0).abs()
    with at_level(level) as (_, _, quantize_absmax):
        quantized, nested_absmax, offset = quantize_absmax(absmax, ops.DYNAMIC8, 256)
    parts = {"nested_absmax": nested_absmax, "nested_quant_map": ops.DYNAMIC8, "nested_offset": offset}
    assert torch.equal(PackedWeight(torch.empty(0), quantized, ops.NF4, (0,), **parts).scales(), absmax)


def test_bits_per_parameter_and_error_of_double_quantization():
    x = data("normal", (1024, 1024), torch.float32, 7)
    weight, smaller = ops.quantize_4bit(x), ops.quantize_4bit(x, double_quant=True)
    stored = 8 * (smaller.codes.numel() + smaller.absmax.numel()) + 32 * smaller.nested_absmax.numel()
    assert stored / x.numel() == 4 + 8 / 64 + 32 / (64 * 256)
    plain, double = ops.dequantize_4bit(weight), ops.dequantize_4bit(smaller)
    assert 0.07 < (plain - x).pow(2).mean().sqrt() < 0.11  # QLoRA's normal weights: about 0.09 sigma
    assert ((double - plain).abs().max() / weight.absmax.max()) < 0.01


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_empty(level, shape):
    with at_level(level) as (quantize, dequantize, quantize_absmax):
        packed, absmax = quantize(torch.empty(shape), ops.NF4, 64)
        assert packed.shape == (0, 1) and absmax.shape == (0,)
        assert dequantize([packed, absmax, ops.NF4], [64, 0, *shape], torch.float16).shape == shape
        quantized, nested, offset = quantize_absmax(absmax, ops.DYNAMIC8, 256)
        assert quantized.shape == nested.shape == (0,) and offset == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [64, 70])
def test_non_finite_input_shows_in_its_scale_only(level, count, bnb):
    x = data("normal", (count * 3,), torch.float32, 1)
    x[2] = math.nan
    x[-1] = -math.inf
    with at_level(level) as (quantize, dequantize, _):
        packed, absmax = quantize(x, ops.NF4, 64)
        y = dequantize([packed, absmax, ops.NF4], [64, 0, *x.shape], x.dtype)
    assert absmax[0].isnan() and absmax[-1] == math.inf and absmax[1:-1].isfinite().all()
    assert y[:64].isnan().all() and y[64 : absmax[:-1].numel() * 64].isfinite().all()
    assert (packed[:32] == 0xFF).all()
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(packed, theirs.reshape(-1, 1)) and same(absmax, state.absmax)


@pytest.mark.parametrize("level", LEVELS)
def test_bad_arguments_are_named_with_what_was_found(level):
    x = torch.zeros(128)
    nested = (torch.zeros(1), ops.DYNAMIC8, torch.zeros(()))
    code_with_nan = torch.full((16,), math.nan)
    with at_level(level) as (quantize, dequantize, quantize_absmax):
        codes, absmax = quantize(x, ops.NF4, 64)
        parts, flat = [codes, absmax, ops.NF4], [64, 0, 128]
        fp32 = torch.float32
        cases = [
            (TypeError, "float32, float16 and bfloat16.*(Int|int64|Long)", lambda: quantize(x.long(), ops.NF4, 64)),
            (TypeError, "only float32.*(Double|float64)", lambda: quantize(x.double(), ops.NF4, 64)),
            (ValueError, "blocksize must be a power of two from 32 to 4096, found 48",
             lambda: quantize(x, ops.NF4, 48)),
            (ValueError, "found 16", lambda: quantize(x, ops.NF4, 16)),
            (ValueError, "found -64", lambda: quantize(x, ops.NF4, -64)),
            (ValueError, "found 8192", lambda: quantize(x, ops.NF4, 8192)),
            (TypeError, "quant_map must be", lambda: quantize(x, ops.NF4.half(), 64)),
            (ValueError, r"quant_map must hold 16 elements.*found 256 of shape \[256\]",
             lambda: quantize(x, ops.DYNAMIC8, 64)),
            (ValueError, r"quant_map\[0\] must be finite, found nan", lambda: quantize(x, code_with_nan, 64)),
            (ValueError, r"codes must hold 65 elements.*found 64 of shape \[64, 1\]",
             lambda: dequantize(parts, [64, 0, 129], fp32)),
            (ValueError, "shape must not be negative", lambda: dequantize(parts, [64, 0, -1], fp32)),
            (TypeError, "codes must be", lambda: dequantize([codes.int(), *parts[1:]], flat, fp32)),
            (TypeError, "absmax must be", lambda: dequantize([codes, absmax.half(), ops.NF4], flat, fp32)),
            (ValueError, "absmax must hold 4 elements.*found 2", lambda: dequantize(parts, [32, 0, 128], fp32)),
            (TypeError, "only float32", lambda: dequantize(parts, flat, torch.int8)),
            (ValueError, "zero points need affine codes, found packing",
             lambda: dequantize([*parts, nested[0]], flat, fp32)),
            (ValueError, "a weight in 4 bits is 3 tensors, 4 with zero points, or 6 with nested scales, found 5",
             lambda: dequantize([*parts, *nested[:2]], flat, fp32)),
            (ValueError, "a dense weight is 1 tensor .without packing., found 3", lambda: dequantize(parts, [], fp32)),
            (ValueError, r"the weight must be in 4 bits, found a dense one of shape \[128\]",
             lambda: dequantize([x], [], fp32)),
            (ValueError, r"packing must be \[blocksize, nested_blocksize, shape..\], found \[64\]",
             lambda: dequantize(parts, [64], fp32)),
            (ValueError, "nested_blocksize must be 0 without nested scales, found 256",
             lambda: dequantize(parts, [64, 256, 128], fp32)),
            (TypeError, "absmax must be", lambda: dequantize([*parts, *nested], [64, 256, 128], fp32)),
            (ValueError, "nested_blocksize must be a power of two",
             lambda: dequantize([codes, absmax.byte(), ops.NF4, *nested], [64, 100, 128], fp32)),
            (TypeError, "absmax must be", lambda: quantize_absmax(absmax.half(), ops.DYNAMIC8, 256)),
            (ValueError, "quant_map must be sorted", lambda: quantize_absmax(absmax, ops.DYNAMIC8.flip(0), 256)),
        ]  # fmt: skip
        for error, message, call in cases:
            with pytest.raises(error, match=message):
                call()
