// Vectors of AVX-512, shared by the files of its levels. The namespace is anonymous because each level compiles its
// copy.
#pragma once

#include "common/avx512.h"
#include "gemm/cpu/transpose.h"
#include "simd/lanes.h"

namespace peftcore {
namespace simd {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16, kRows = 12;  // of 32 registers, up to 24 hold sums
    using Vector = __m512;

    static inline Vector zero() { return _mm512_setzero_ps(); }
    static inline Vector set(float value) { return _mm512_set1_ps(value); }
    static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    static inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

    template <typename T>
    static inline Vector load(const T* from) {
        return load16(from);
    }

    static inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
    static inline void store(Half* to, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static inline void store(BFloat16* to, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(v));
    }

    // `count` <= 16 values, `stride` apart, followed by zeros, if offsets fit 32 bits.
    static inline bool gather(const float* from, int64_t stride, int64_t count, float* out) {
        if (stride > (int64_t(1) << 26)) return false;
        const __mmask16 there = __mmask16((1u << count) - 1);
        const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i offsets = _mm512_mullo_epi32(steps, _mm512_set1_epi32(int32_t(stride)));
        _mm512_storeu_ps(out, stride == 1 ? _mm512_maskz_loadu_ps(there, from)
                                          : _mm512_mask_i32gather_ps(zero(), there, offsets, from, 4));
        return true;
    }

    static inline void transpose(Vector (&rows)[kLanes]) {
        __m512i words[kLanes];
        for (int i = 0; i < kLanes; ++i) words[i] = _mm512_castps_si512(rows[i]);
        gemm::transpose_words(words);
        for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_castsi512_ps(words[i]);
    }

    static inline Vector keep(Vector v, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), v); }

    // Eight counters a vector, each word in the low half of a 64-bit lane; products ignore the high half.
    static inline void keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                  uint8_t* out) {
        const __m512i multiply0 = _mm512_set1_epi64(kPhiloxMultiply0),
                      multiply1 = _mm512_set1_epi64(kPhiloxMultiply1);
        const __m512i threshold = _mm512_set1_epi16(short(dropout.threshold));
        const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
        const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
        const __m512i steps = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        for (int64_t at = 0; at < count; at += kCounters) {
            __m512i a[2], b[2], c[2], d[2];
            for (int i = 0; i < 2; ++i) {
                a[i] = _mm512_add_epi64(_mm512_set1_epi64(first + at + 8 * i), steps);
                b[i] = _mm512_set1_epi64(row);
                c[i] = _mm512_set1_epi64(row >> 32);
                d[i] = _mm512_setzero_si512();
            }
            uint32_t key0 = dropout.key0, key1 = dropout.key1;
            for (int round = 0; round < kPhiloxRounds; ++round) {
                const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
                for (int i = 0; i < 2; ++i) {
                    const __m512i p = _mm512_mul_epu32(a[i], multiply0),
                                  q = _mm512_mul_epu32(c[i], multiply1);
                    a[i] =
                        _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), b[i], k0, 0x96);  // exclusive or
                    b[i] = q;
                    c[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), d[i], k1, 0x96);
                    d[i] = p;
                }
                key0 += kPhiloxWeyl0;
                key1 += kPhiloxWeyl1;
            }
            for (int i = 0; i < 2; ++i) {
                const __m512i ab = _mm512_mask_mov_epi32(a[i], 0xaaaa, _mm512_slli_epi64(b[i], 32));
                const __m512i cd = _mm512_mask_mov_epi32(c[i], 0xaaaa, _mm512_slli_epi64(d[i], 32));
                const uint32_t bits[2] = {
                    _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64(ab, low, cd), threshold),
                    _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64(ab, high, cd), threshold)};
                std::memcpy(out + at + 8 * i, bits, sizeof bits);
            }
        }
    }

    static inline Vector sums(const Vector* v) {
        Vector quarter[4];  // four of v each: their sums over each 128-bit lane
        for (int i = 0; i < 4; ++i) {
            const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]),
                                           _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
            const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]),
                                           _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
            const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
            quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
        }
        const auto lanes = [](Vector a, Vector b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        return lanes(lanes(quarter[0], quarter[1]), lanes(quarter[2], quarter[3]));
    }
};

}  // namespace
}  // namespace simd
}  // namespace peftcore
