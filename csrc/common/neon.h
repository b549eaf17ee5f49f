// Shared by the files of NEON. The namespace is anonymous because each level compiles its own copy.
#pragma once

#include <arm_neon.h>

#include "common/half.h"

namespace peftcore {
namespace {

// Four values widened to fp32, exactly.
inline float32x4_t load_four(const float* from) { return vld1q_f32(from); }
inline float32x4_t from_half(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
inline float32x4_t from_bfloat16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }

// Four values rounded to 16 bits, to nearest, ties to even.
inline uint16x4_t rounded(float32x4_t values, const Half*) {
    return vreinterpret_u16_f16(vcvt_f16_f32(values));
}
inline uint16x4_t rounded(float32x4_t values, const BFloat16*) {
    const uint32x4_t bits = vreinterpretq_u32_f32(values);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t upper = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbsl_u16(vmovn_u32(vceqq_f32(values, values)), upper,
                    vdup_n_u16(0x7fc0));  // for NaN, always this one
}

inline const uint16_t* bits_of(const Half* values) { return &values->bits; }
inline const uint16_t* bits_of(const BFloat16* values) { return &values->bits; }
inline uint16_t* bits_of(Half* values) { return &values->bits; }
inline uint16_t* bits_of(BFloat16* values) { return &values->bits; }

// Eight values, as two vectors of fp32.
struct EightFloats {
    float32x4_t low, high;
};

inline EightFloats load_eight(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
inline EightFloats load_eight(const Half* from) {
    const uint16x8_t bits = vld1q_u16(bits_of(from));
    return {from_half(vget_low_u16(bits)), vcvt_high_f32_f16(vreinterpretq_f16_u16(bits))};
}
inline EightFloats load_eight(const BFloat16* from) {
    const uint16x8_t bits = vld1q_u16(bits_of(from));
    return {from_bfloat16(vget_low_u16(bits)), vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}

// Sixteen byte indices into a table of fp32, for lanes of 32 bits whose index is minus `negative`.
inline uint8x16_t byte_index(int32x4_t negative) {
    const int32x4_t first = vdupq_n_s32(0x03020100);
    return vreinterpretq_u8_s32(vmlsq_s32(first, negative, vdupq_n_s32(0x04040404)));
}

// Both nibbles of 16 bytes as 32 indices in order: the high nibble of a byte first.
inline uint8x16x2_t nibbles(uint8x16_t bytes) {
    const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
    return {{vzip1q_u8(even, odd), vzip2q_u8(even, odd)}};
}

// Table of sixteen entries of 16 bits, as two tables of bytes.
struct ShortTable {
    ShortTable() = default;
    ShortTable(uint16x8_t first, uint16x8_t second)
        : low(vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second))),
          high(vuzp2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second))) {}

    inline uint16x8x2_t operator()(uint8x16_t index) const {
        const uint8x16_t below = vqtbl1q_u8(low, index), above = vqtbl1q_u8(high, index);
        return {
            {vreinterpretq_u16_u8(vzip1q_u8(below, above)), vreinterpretq_u16_u8(vzip2q_u8(below, above))}};
    }

    uint8x16_t low, high;
};

// Table of sixteen entries of fp32, as four tables of bytes.
struct FloatTable {
    explicit FloatTable(const float* code)
        : FloatTable(vld1q_f32(code), vld1q_f32(code + 4), vld1q_f32(code + 8), vld1q_f32(code + 12)) {}
    FloatTable(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
        const auto even = [](float32x4_t x, float32x4_t y) {
            return vuzp1q_u16(vreinterpretq_u16_f32(x), vreinterpretq_u16_f32(y));
        };
        const auto odd = [](float32x4_t x, float32x4_t y) {
            return vuzp2q_u16(vreinterpretq_u16_f32(x), vreinterpretq_u16_f32(y));
        };
        lower = ShortTable(even(a, b), even(c, d));
        upper = ShortTable(odd(a, b), odd(c, d));
    }

    struct Values {
        float32x4_t of[4];
    };
    inline Values operator()(uint8x16_t index) const {
        const uint16x8x2_t below = lower(index), above = upper(index);
        Values values;
        for (int i = 0; i < 2; ++i) {
            values.of[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(below.val[i], above.val[i]));
            values.of[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(below.val[i], above.val[i]));
        }
        return values;
    }

    ShortTable lower, upper;  // the lower and the upper 16 bits
};

}  // namespace
}  // namespace peftcore
