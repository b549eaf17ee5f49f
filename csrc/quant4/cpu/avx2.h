// Codes of 4 bits looked up in fp32, 8 at a time, by AVX2.
#pragma once

#include <cstring>

#include "common/avx2.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// Table of the 16 codes' values, times a block's scale.
struct FloatTable {
    __m256 low, high;

    // Of a block of a weight.
    FloatTable(const WeightView& weight, int64_t block)
        : low(_mm256_loadu_ps(weight.quant_map)), high(_mm256_loadu_ps(weight.quant_map + 8)) {
        if (weight.zeros != nullptr) {
            const __m256 zero = _mm256_set1_ps(block_zero(weight, block));
            low = _mm256_sub_ps(low, zero);
            high = _mm256_sub_ps(high, zero);
        }
        const __m256 scale = _mm256_set1_ps(block_scale(weight, block));
        low = _mm256_mul_ps(low, scale);
        high = _mm256_mul_ps(high, scale);
    }

    FloatTable(__m256 first, __m256 second, float scale)
        : low(_mm256_mul_ps(first, _mm256_set1_ps(scale))),
          high(_mm256_mul_ps(second, _mm256_set1_ps(scale))) {}
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
