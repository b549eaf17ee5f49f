// Rows of bf16 turned into pairs, to unpack a transposed matrix into tiles.
#pragma once

#include "common/avx512.h"
#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {
namespace {

// Eight columns of 16 rows, `stride` values apart, as four pairs of 16, `out_stride` words apart.
inline void transpose(const uint16_t* from, int64_t stride, uint32_t* out, int64_t out_stride) {
    const FourColumns pairs = four_columns([&](int row) { return from + row * stride; });
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * out_stride, pairs.of[i]);
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
