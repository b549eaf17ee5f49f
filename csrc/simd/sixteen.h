// `Sixteen` fp32 values, whatever number of vectors that takes at a level, and `Native`, as many values as one vector of
// the level has. Operations act on single values and are never contracted, so that all levels give the same bits; only
// `fused` is an exception.
#pragma once

#include <cstdint>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/half.h"

// The calling convention of these vectors depends on the level, but every function here is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#define PEFTCORE_INLINED __attribute__((always_inline)) static inline

namespace peftcore {
namespace simd {

constexpr int64_t kSixteen = 16;
typedef float Sixteen __attribute__((vector_size(64), may_alias));
typedef uint32_t SixteenBits __attribute__((vector_size(64), may_alias));

using peftcore::bits_float;
using peftcore::float_bits;

PEFTCORE_INLINED SixteenBits float_bits(const Sixteen& x) { return (SixteenBits)x; }
PEFTCORE_INLINED Sixteen bits_float(const SixteenBits& bits) { return (Sixteen)bits; }

#if defined(__AVX512F__)
constexpr int64_t kNative = 16;
typedef Sixteen Native;
typedef SixteenBits NativeBits;
#else
#if defined(__AVX__)
constexpr int64_t kNative = 8;
#else
constexpr int64_t kNative = 4;
#endif
typedef float Native __attribute__((vector_size(4 * kNative), may_alias));
typedef uint32_t NativeBits __attribute__((vector_size(4 * kNative), may_alias));
PEFTCORE_INLINED NativeBits float_bits(const Native& x) { return (NativeBits)x; }
PEFTCORE_INLINED Native bits_float(const NativeBits& bits) { return (Native)bits; }
#endif

// `from` is aligned to the vector.
PEFTCORE_INLINED Native& native_at(float* from) { return *reinterpret_cast<Native*>(from); }

// `from` is aligned to 64 bytes.
PEFTCORE_INLINED Sixteen& sixteen_at(float* from) { return *reinterpret_cast<Sixteen*>(from); }
PEFTCORE_INLINED const Sixteen& sixteen_at(const float* from) {
    return *reinterpret_cast<const Sixteen*>(from);
}

// a b + c, rounded once where the level's processors have an instruction for it.
PEFTCORE_INLINED Native fused(const Native& a, const Native& b, const Native& c) {
#if defined(__AVX512F__)
    return Native(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    return Native(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__ARM_NEON)
    return Native(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    return a * b + c;
#endif
}

PEFTCORE_INLINED uint32_t at_most(uint32_t x, uint32_t most) { return x < most ? x : most; }
template <typename Bits>
PEFTCORE_INLINED Bits at_most(const Bits& x, uint32_t most) {
    const Bits limit = Bits{} + most;
    return x < limit ? x : limit;
}

// All bits where x exceeds `limit`, else none; the two are less than 2^31 apart. Not a comparison: of vectors longer than
// the processor's, g++ compares the values one by one.
template <typename Bits>
PEFTCORE_INLINED Bits where_above(const Bits& x, uint32_t limit) {
    return 0u - ((limit - x) >> 31u);
}

// All bits where x is NaN.
template <typename F>
PEFTCORE_INLINED auto where_nan(const F& x) {
    return where_above(float_bits(x) & 0x7fffffffu, 0x7f800000u);
}

}  // namespace simd
}  // namespace peftcore
