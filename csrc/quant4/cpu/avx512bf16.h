// Values of 4-bit codes in bf16, each rounded once: code[index] times scale.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// The codebook's values times a scale, repeated, so that an index's fifth bit does not matter. Subnormals become zero, as
// in products of bf16.
inline __m512i scaled(__m512 code, float scale) {
    return _mm512_broadcast_i64x4(__m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(scale)))));
}

// The same, with the scale and the zero point of a block of a weight.
inline __m512i scaled(__m512 code, const WeightView& weight, int64_t block) {
    if (weight.zeros != nullptr) code = _mm512_sub_ps(code, _mm512_set1_ps(block_zero(weight, block)));
    return scaled(code, block_scale(weight, block));
}

// body(a function that returns a block's values): the kind of scales is found once, not in each block.
template <typename Body>
inline void with_tables(const WeightView& weight, const Body& body) {
    const __m512 code = _mm512_loadu_ps(weight.quant_map);
    if (weight.zeros != nullptr) return body([&](int64_t block) { return scaled(code, weight, block); });
    with_scales(weight, [&](const auto& scales) {
        body([&](int64_t block) { return scaled(code, scales.at(block)); });
    });
}

inline __m128i sixteen(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// 32 values in order.
inline __m512i decoded(const uint8_t* packed, __m512i table) {
    const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(packed));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    return _mm512_permutexvar_epi16(index, table);
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
