// A weight [rows, columns] for kernels and launchers: pointers and sizes, without PyTorch. `Weight` (weight.h) makes it from
// checked tensors. On CUDA all pointers are device pointers.
//
// Everything here is `static`, as in common/half.h.
#pragma once

#include <cstdint>

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/half.h"
#include "common/integers.h"

namespace peftcore {

// Block sizes of values and of scales are powers of two.
constexpr int kMinBlocksize = 32;
constexpr int kMinNestedBlocksize = 16;  // of values with nested scales (NVFP4), for kernels that say so
constexpr int kMaxBlocksize = 4096;

// How the scale of a block is stored. A format of 4 bits is a codebook (`quant_map`) and one of these; a policy below
// decodes each.
enum class ScaleKind : int {
    kFloat,   // fp32
    kNested,  // 8 bits, around their mean, in blocks with a scale of their own (QLoRA's double quantization)
    kPowerOfTwo,  // E8M0: 2^(e - 127), and NaN for 255 (OCP Microscaling 1.0)
    kAffine,      // fp32, fp16 or bf16, and a value is (quant_map[code] - (zero point - kCentre)) * scale
};

constexpr int kCentre = 8;  // zero point of affine codes without `zeros`

struct WeightView {
    int64_t rows = 0, columns = 0;

    const void* dense = nullptr;  // values, contiguous; or nullptr, and the weight is in 4 bits
    int itemsize = 0;             // bytes of a dense value

    const uint8_t* codes = nullptr;    // two a byte, the even element in the high nibble
    const void* absmax = nullptr;      // scale of each block, as `scales` says: fp32 or uint8
    const float* quant_map = nullptr;  // [16]
    int shift = 0;                     // log2 of the block size

    const float *nested_absmax = nullptr, *nested_quant_map = nullptr, *nested_offset = nullptr;
    int nested_shift = 0;  // log2 of the block size of scales
    // Of this weight, counted from where `nested_absmax` begins: an expert may begin within a block of scales.
    int64_t first_block = 0;

    ScaleKind scales = ScaleKind::kFloat;

    Dtype scale_dtype = Dtype::kFloat;  // of affine scales
    const void* zeros = nullptr;        // zero point of each block, or nullptr
    bool whole_zeros = true;            // they are uint8; otherwise fp32

    PEFTCORE_HD int64_t numel() const { return rows * columns; }
    PEFTCORE_HD int64_t blocks() const { return ceil_div(numel(), int64_t(1) << shift); }
};

// --- policies: a scale as a number, on the host. Compiled with -ffp-contract=off: products are rounded before sums. ---
//
// `copy` writes the scales of blocks [first, last). A loop that also stores reads scales faster from there than one by
// one: as far as the compiler knows, each store could change the weight, and loads wait for the store buffer.

namespace {

struct FloatScales {
    explicit FloatScales(const WeightView& weight) : from(static_cast<const float*>(weight.absmax)) {}

    float at(int64_t block) const { return from[block]; }
    void copy(int64_t first, int64_t last, float* out) const {
        for (int64_t b = first; b < last; ++b) out[b - first] = from[b];
    }

    const float* from;
};

struct NestedScales {
    explicit NestedScales(const WeightView& view) : weight(view) {}

    float at(int64_t block) const {
        const uint8_t code = static_cast<const uint8_t*>(weight.absmax)[block];
        const float outer = weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift];
        const float product = weight.nested_quant_map[code] * outer;
        return product + *weight.nested_offset;
    }
    void copy(int64_t first, int64_t last, float* out) const {
        const uint8_t* absmax = static_cast<const uint8_t*>(weight.absmax);
        const float* quant_map = weight.nested_quant_map;
        const float offset = *weight.nested_offset;
        for (int64_t b = first; b < last;) {
            const int64_t nested = (weight.first_block + b) >> weight.nested_shift;
            const int64_t run = ((nested + 1) << weight.nested_shift) - weight.first_block;
            const int64_t stop = run < last ? run : last;
            const float outer = weight.nested_absmax[nested];
            for (; b < stop; ++b) {
                const float product = quant_map[absmax[b]] * outer;
                out[b - first] = product + offset;
            }
        }
    }

    const WeightView& weight;
};

// The bits of 2^(e - 127). 2^-127 is a subnormal of fp32, whose bits are larger than those of e = 0; NaN has another bit
// than those of e = 255.
PEFTCORE_HD uint32_t power_of_two_bits(uint8_t e) {
    const uint32_t bits = uint32_t(e) << 23, one = 0x00400000u;
    return (bits > one ? bits : one) | (e == 255 ? one : 0u);
}

struct PowerOfTwoScales {
    explicit PowerOfTwoScales(const WeightView& weight) : from(static_cast<const uint8_t*>(weight.absmax)) {}

    float at(int64_t block) const { return bits_float(power_of_two_bits(from[block])); }
    void copy(int64_t first, int64_t last, float* out) const {
        for (int64_t b = first; b < last; ++b) out[b - first] = at(b);
    }

    const uint8_t* from;
};

inline void widen(const float* from, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = from[i];
}
inline void widen(const BFloat16* from, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
}
inline void widen(const Half* from, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__F16C__) && !defined(__CUDACC__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; ++i) out[i] = to_float(from[i]);
}

struct AffineScales {
    explicit AffineScales(const WeightView& view) : weight(view) {}

    // body(the scales from `block` on)
    template <typename Body>
    auto from(int64_t block, const Body& body) const {
        if (weight.scale_dtype == Dtype::kHalf) return body(static_cast<const Half*>(weight.absmax) + block);
        if (weight.scale_dtype == Dtype::kBFloat16)
            return body(static_cast<const BFloat16*>(weight.absmax) + block);
        return body(static_cast<const float*>(weight.absmax) + block);
    }
    float at(int64_t block) const {
        return from(block, [](const auto* scale) { return to_float(*scale); });
    }
    void copy(int64_t first, int64_t last, float* out) const {
        from(first, [&](const auto* scale) { widen(scale, last - first, out); });
    }

    const WeightView& weight;
};

// What is subtracted from a block's entries of the codebook, of a weight with `zeros`.
inline float block_zero(const WeightView& weight, int64_t block) {
    const float point = weight.whole_zeros ? float(static_cast<const uint8_t*>(weight.zeros)[block])
                                           : static_cast<const float*>(weight.zeros)[block];
    return point - float(kCentre);
}

// The values of a block's codes before they are scaled.
inline void block_entries(const WeightView& weight, int64_t block, float (&out)[16]) {
    const float zero = block_zero(weight, block);
    for (int i = 0; i < 16; ++i) out[i] = weight.quant_map[i] - zero;
}

}  // namespace

// body(the policy of the weight's scales)
template <typename Body>
static inline auto with_scales(const WeightView& weight, const Body& body) {
    if (weight.scales == ScaleKind::kNested) return body(NestedScales(weight));
    if (weight.scales == ScaleKind::kPowerOfTwo) return body(PowerOfTwoScales(weight));
    if (weight.scales == ScaleKind::kAffine) return body(AffineScales(weight));
    return body(FloatScales(weight));
}

static inline float block_scale(const WeightView& weight, int64_t block) {
    return with_scales(weight, [&](const auto& scales) { return scales.at(block); });
}

static inline void block_scales(const WeightView& weight, int64_t first, int64_t last, float* out) {
    with_scales(weight, [&](const auto& scales) { scales.copy(first, last, out); });
}

static PEFTCORE_HD int scale_bytes(const WeightView& weight) {
    if (weight.scales == ScaleKind::kAffine) return weight.scale_dtype == Dtype::kFloat ? 4 : 2;
    return weight.scales == ScaleKind::kFloat ? int(sizeof(float)) : 1;
}

// View, without a copy, of expert `index` of a weight [experts, out, in], whose view has experts * out rows. In 4 bits
// an expert consists of whole blocks. It may begin within a block of scales.
static PEFTCORE_HD WeightView expert_of(const WeightView& weight, int64_t index, int64_t experts) {
    WeightView expert = weight;
    expert.rows = weight.rows / experts;
    const int64_t begin = index * expert.numel(), block = begin >> weight.shift;
    if (weight.dense != nullptr) {
        expert.dense = static_cast<const char*>(weight.dense) + begin * weight.itemsize;
        return expert;
    }
    expert.codes = weight.codes + begin / 2;
    expert.absmax = static_cast<const char*>(weight.absmax) + block * scale_bytes(weight);
    if (weight.zeros != nullptr)
        expert.zeros = static_cast<const char*>(weight.zeros) +
                       block * (weight.whole_zeros ? 1 : int64_t(sizeof(float)));
    if (weight.scales == ScaleKind::kNested) {
        const int64_t first = weight.first_block + block, nested = first >> weight.nested_shift;
        expert.nested_absmax = weight.nested_absmax + nested;
        expert.first_block = first - (nested << weight.nested_shift);
    }
    return expert;
}

}  // namespace peftcore
