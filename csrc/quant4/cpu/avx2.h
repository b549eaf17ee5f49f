// Codes of 4 bits looked up in fp32, 8 at a time, by AVX2.
#pragma once

#include <cstring>

#include "common/avx2.h"

namespace peftcore {
namespace quant4 {
namespace {

// Table of the 16 codes' values, times a block's scale.
struct FloatTable {
    __m256 low, high;

    FloatTable(__m256 first, __m256 second, float scale)
        : low(_mm256_mul_ps(first, _mm256_set1_ps(scale))),
          high(_mm256_mul_ps(second, _mm256_set1_ps(scale))) {}
    FloatTable(const float* code, float scale)
        : FloatTable(_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8), scale) {}
};

// Looks values up by the lowest four bits of each index.
inline __m256 looked_up(__m256i index, __m256 low, __m256 high) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            upper);
}

// The 8 values of four bytes; the high nibble of a byte comes first.
inline __m256 decoded8(const uint8_t* packed, const FloatTable& table) {
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    int32_t bytes;
    memcpy(&bytes, packed, sizeof bytes);
    return looked_up(_mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts), table.low, table.high);
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
