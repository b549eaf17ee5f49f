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

// 16 rows of 16 words become columns.
inline void transpose_words(__m512i (&row)[16]) {
    __m512i quarter[16];  // 4 g + c: in lane l column 4 l + c of rows 4 g to 4 g + 3
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
        const __m512i ab_low = _mm512_unpacklo_epi32(row[g], row[g + 1]),
                      ab_high = _mm512_unpackhi_epi32(row[g], row[g + 1]),
                      cd_low = _mm512_unpacklo_epi32(row[g + 2], row[g + 3]),
                      cd_high = _mm512_unpackhi_epi32(row[g + 2], row[g + 3]);
        quarter[g] = _mm512_unpacklo_epi64(ab_low, cd_low);
        quarter[g + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        quarter[g + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        quarter[g + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i even_ab = _mm512_shuffle_i32x4(quarter[c], quarter[4 + c], 0x88),
                      odd_ab = _mm512_shuffle_i32x4(quarter[c], quarter[4 + c], 0xdd),
                      even_cd = _mm512_shuffle_i32x4(quarter[8 + c], quarter[12 + c], 0x88),
                      odd_cd = _mm512_shuffle_i32x4(quarter[8 + c], quarter[12 + c], 0xdd);
        row[c] = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
        row[4 + c] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
        row[8 + c] = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
        row[12 + c] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
    }
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore
