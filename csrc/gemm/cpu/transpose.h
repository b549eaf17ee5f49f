// Rows of bf16 turned into pairs, for what unpacks a transposed matrix into tiles.
#pragma once

#include <immintrin.h>

#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {
namespace {

// The 128 bits at `from` and at the fourth, eighth and twelfth row behind.
inline __m512i four_rows(const uint16_t* from, int64_t stride) {
    const auto at = [&](int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
    };
    __m512i result = _mm512_castsi128_si512(at(0));
    result = _mm512_inserti32x4(result, at(4), 1);
    result = _mm512_inserti32x4(result, at(8), 2);
    return _mm512_inserti32x4(result, at(12), 3);
}

// Eight columns of 16 rows, `stride` values apart, as four pairs of 16, `out_stride` words apart.
inline void transpose(const uint16_t* from, int64_t stride, uint32_t* out, int64_t out_stride) {
    const __m512i a = four_rows(from, stride), b = four_rows(from + stride, stride);
    const __m512i c = four_rows(from + 2 * stride, stride), d = four_rows(from + 3 * stride, stride);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab_low, cd_low));
    _mm512_storeu_si512(out + out_stride, _mm512_unpackhi_epi64(ab_low, cd_low));
    _mm512_storeu_si512(out + 2 * out_stride, _mm512_unpacklo_epi64(ab_high, cd_high));
    _mm512_storeu_si512(out + 3 * out_stride, _mm512_unpackhi_epi64(ab_high, cd_high));
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore
