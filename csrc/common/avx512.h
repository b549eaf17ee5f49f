// Shared by the files of AVX-512. The namespace is anonymous because each level compiles its own copy.
#pragma once

#include <immintrin.h>

#include "common/half.h"

namespace peftcore {
namespace {

// 16 values rounded to bf16, to the nearest, ties to even, in the upper halves; the lower ones hold anything.
// Not vcvtneps2bf16: it flushes subnormals to zero.
inline __m512i bf16_in_upper_half(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

inline __m256i to_bf16(__m512 values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_in_upper_half(values), 16));
}

inline __m512 from_bf16(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// 16 values of any dtype, widened to fp32.
inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load16(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 load16(const BFloat16* from) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Four 32-bit words of each of 16 rows, as vectors of one word of all rows. `row(i)`: address of row i's words.
struct FourColumns {
    __m512i of[4];
};

template <typename Row>
inline FourColumns four_columns(const Row& row) {
    const auto words = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(i))); };
    const auto four_rows = [&](int i) {
        __m512i result = _mm512_castsi128_si512(words(i));
        result = _mm512_inserti32x4(result, words(i + 4), 1);
        result = _mm512_inserti32x4(result, words(i + 8), 2);
        return _mm512_inserti32x4(result, words(i + 12), 3);
    };
    const __m512i a = four_rows(0), b = four_rows(1), c = four_rows(2), d = four_rows(3);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
             _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
}

// The sum of each of 16 rows of 16 floats. `row(i)`: address of row i.
template <typename Row>
inline __m512 sums_of_lanes(const Row& row) {
    __m512 sum = _mm512_setzero_ps();
    for (int lane = 0; lane < 16; lane += 4) {
        const FourColumns lanes = four_columns([&](int i) { return row(i) + lane; });
        sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_add_ps(__m512(lanes.of[0]), __m512(lanes.of[1])),
                                               _mm512_add_ps(__m512(lanes.of[2]), __m512(lanes.of[3]))));
    }
    return sum;
}

}  // namespace
}  // namespace peftcore
