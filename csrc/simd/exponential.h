// e^x in fp32, for a float or a vector of sixteen.h.
#pragma once

#include "simd/sixteen.h"

namespace peftcore {
namespace simd {

constexpr uint32_t kSignBit = 0x80000000u;

// x with its magnitude clamped to the float whose bits are `most`. F is float or a vector of sixteen.h.
template <typename F>
PEFTCORE_INLINED F limited(const F& x, uint32_t most) {
    return bits_float(at_most(float_bits(x) & ~kSignBit, most) | (float_bits(x) & kSignBit));
}

// Rounding of a b + c: `Twice` rounds the product and the sum and gives the same bits at all levels; `Fused` rounds once.
struct Twice {
    template <typename F>
    PEFTCORE_INLINED F multiply_add(const F& a, const F& b, const F& c) {
        return a * b + c;
    }
};
struct Fused {
    PEFTCORE_INLINED Native multiply_add(const Native& a, const Native& b, const Native& c) {
        return fused(a, b, c);
    }
};

// e^x for x in [-88, 88]. Relative error at most 2e-7: 2^n times the Taylor polynomial of degree seven, whose error on
// half of ln 2 is 5e-9.
template <typename Rounding = Twice, typename F>
PEFTCORE_INLINED F exponential_within(const F& x) {
    const auto add = [](const F& a, const F& b, float c)
                         __attribute__((always_inline)) { return Rounding::multiply_add(a, b, F{} + c); };
    constexpr float kRound = 12582912.0f;  // 1.5 · 2^23, where fp32 values are integers
    const F shifted = add(x, F{} + 1.44269504f, kRound), n = shifted - kRound;
    // ln 2 in two parts
    const F above = Rounding::multiply_add(n, F{} - 0.693359375f, x);
    const F r = Rounding::multiply_add(n, F{} + 2.12194440e-4f, above);
    F sum = add(r, F{} + 1.0f / 5040, 1.0f / 720);
    sum = add(sum, r, 1.0f / 120);
    sum = add(sum, r, 1.0f / 24);
    sum = add(sum, r, 1.0f / 6);
    sum = add(sum, r, 0.5f);
    sum = add(sum, r, 1.0f);
    sum = add(sum, r, 1.0f);
    return sum * bits_float((float_bits(shifted) - (float_bits(kRound) - 127u)) << 23u);
}

// e^x, with x clamped to [-88, 88].
template <typename Rounding = Twice, typename F>
PEFTCORE_INLINED F exponential(const F& x) {
    constexpr uint32_t k88 = 0x42b00000u;
    return exponential_within<Rounding>(limited(x, k88));
}

constexpr uint32_t kLeastBits = 0xc2ae0000u;  // -87, whose exponential is still normal

// max(x, -87) for x <= 0, and e^x, which is 0 below -87. For NaN both are unspecified finite numbers.
template <typename F>
struct Below {
    F value, exponential;

    __attribute__((always_inline)) explicit inline Below(const F& x) {
        const auto bits = float_bits(x) | kSignBit;  // of negative values larger for a larger magnitude
        value = bits_float(at_most(bits, kLeastBits));
        exponential = bits_float(float_bits(exponential_within(value)) & ~where_above(bits, kLeastBits - 1));
    }
};

}  // namespace simd
}  // namespace peftcore
