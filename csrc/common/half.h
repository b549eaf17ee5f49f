// fp16 and bf16 as bit patterns, converted with round-to-nearest-even on any compiler. On a GPU each
// conversion is one instruction; only the payload of a NaN differs there.
//
// Everything here is `static`: the file is compiled at several SIMD levels, and of a function that
// the linker shares, it would keep the instructions of whichever level came first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PEFTCORE_HD __host__ __device__ __forceinline__
#else
#define PEFTCORE_HD inline
#endif

namespace peftcore {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

static PEFTCORE_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static PEFTCORE_HD float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static PEFTCORE_HD float to_float(float value) { return value; }

static PEFTCORE_HD float to_float(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

static PEFTCORE_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
    // A subnormal is its mantissa times 2^-24, which fp32 holds exactly.
    return bits_float(sign | float_bits(float(magnitude) * 5.9604644775390625e-8f));
#endif
}

template <typename T>
static PEFTCORE_HD T from_float(float value);

template <>
PEFTCORE_HD float from_float<float>(float value) {
    return value;
}

template <>
PEFTCORE_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0u)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
PEFTCORE_HD Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = float_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {
        // Below 2^-14: fp32 values in [0.5, 1) are 2^-24 apart, so the addition itself rounds to fp16's grid.
        const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
        return {uint16_t(sign | rounded)};
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return {uint16_t(sign | (rounded - 0x38000000u) >> 13)};
#endif
}

// Two values rounded to 16 bits, `low` in the lower half.
template <typename T>
static PEFTCORE_HD uint32_t pair_bits(float low, float high) {
    return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

#if defined(__CUDACC__)
template <>
__device__ __forceinline__ uint32_t pair_bits<BFloat16>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
template <>
__device__ __forceinline__ uint32_t pair_bits<Half>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

}  // namespace peftcore
