// AVX-512 with dot products of bf16: a unit is a pair of values.
#pragma once

#include "lora/cpu/avx512.h"

namespace peftcore {
namespace lora {
namespace {

struct Pairs : Avx512 {
    using T = BFloat16;
    using Unit = uint32_t;
    using Right = __m512i;
    static constexpr int kPair = 2;

    using Avx512::store;
    static inline void store(BFloat16* to, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(v)));
    }

    static inline Right load_right(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static inline Vector madd(Vector sum, const uint32_t* left, Right right) {
        return _mm512_dpbf16_ps(sum, __m512bh(_mm512_set1_epi32(int(*left))), __m512bh(right));
    }
    static inline uint32_t unit(BFloat16 even, BFloat16 odd) {
        return uint32_t(even.bits) | uint32_t(odd.bits) << 16;
    }

    static inline bool arrange_line(const BFloat16* row, int64_t inner_stride, int64_t outer_stride,
                                    int64_t count, bool pair, uint32_t* out) {
        const __mmask16 there = __mmask16((1u << count) - 1);
        if (inner_stride == 1 && pair && outer_stride < int64_t(1) << 26) {
            _mm512_storeu_si512(out, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there,
                                                                 sixteen_steps(outer_stride), row, 2));
            return true;
        }
        if (outer_stride != 1) return false;
        const auto words = [&](const BFloat16* from, __mmask16 mask) {
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        };
        const __m512i odd = words(pair ? row + inner_stride : row, pair ? there : 0);
        _mm512_storeu_si512(out, _mm512_or_si512(words(row, there), _mm512_slli_epi32(odd, 16)));
        return true;
    }

    // 32 values, of which those at or behind `count` and those that `keep` drops are zero.
    static inline __m512i load_kept(const BFloat16* from, int64_t count, const uint8_t* keep) {
        __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
        if (keep != nullptr) {
            uint32_t bits;
            std::memcpy(&bits, keep, sizeof bits);
            mask &= bits;
        }
        return _mm512_maskz_loadu_epi16(mask, from);
    }

    static inline void stage_row(const BFloat16* row, int64_t columns, const uint8_t* keep, uint32_t* out) {
        for (int64_t k = 0; k < columns; k += 32)
            _mm512_storeu_si512(out + k / 2,
                                load_kept(row + k, columns - k, keep == nullptr ? nullptr : keep + k / 8));
    }

    static inline void stage_rows(const BFloat16* row, int64_t stride, int64_t count, int64_t columns,
                                  const uint8_t* keep, int64_t keep_stride, uint32_t* out) {
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int64_t k = 0; k < columns; k += 32) {
            const uint8_t* mask = keep == nullptr ? nullptr : keep + k / 8;
            const __m512i even = load_kept(row + k, columns - k, mask);
            const __m512i odd = count == 1 ? _mm512_setzero_si512()
                                           : load_kept(row + stride + k, columns - k,
                                                       mask == nullptr ? nullptr : mask + keep_stride);
            const __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
            _mm512_storeu_si512(out + k, _mm512_permutex2var_epi64(first, low, second));
            if (columns - k > 16)
                _mm512_storeu_si512(out + k + 16, _mm512_permutex2var_epi64(first, high, second));
        }
    }
};

}  // namespace
}  // namespace lora
}  // namespace peftcore
