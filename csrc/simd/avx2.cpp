// AVX2 with FMA and conversions of fp16.
#include "common/avx2.h"

#include "gemm/cpu/transpose8.h"
#include "simd/loops.h"

namespace peftcore {
namespace simd {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8, kRows = 6;  // of 16 registers, 12 hold sums
    using Vector = __m256;

    static inline Vector zero() { return _mm256_setzero_ps(); }
    static inline Vector set(float value) { return _mm256_set1_ps(value); }
    static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    static inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

    template <typename T>
    static inline Vector load(const T* from) {
        return load8(from);
    }
    static inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
    template <typename T>
    static inline void store(T* to, Vector v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), round_to(v, to));
    }

    static inline Vector keep(Vector v, uint32_t bits) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
        return _mm256_and_ps(v, _mm256_castsi256_ps(set));
    }

    // Four counters a vector, each word in the low half of a 64-bit lane; products ignore the high half.
    static inline void keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                  uint8_t* out) {
        const __m256i multiply0 = _mm256_set1_epi64x(kPhiloxMultiply0);
        const __m256i multiply1 = _mm256_set1_epi64x(kPhiloxMultiply1);
        const __m256i threshold = _mm256_set1_epi16(short(dropout.threshold));
        for (int64_t at = 0; at < filled_up(count, kCounters); at += 4) {
            __m256i a = _mm256_add_epi64(_mm256_set1_epi64x(first + at), _mm256_setr_epi64x(0, 1, 2, 3));
            __m256i b = _mm256_set1_epi64x(row), c = _mm256_set1_epi64x(row >> 32),
                    d = _mm256_setzero_si256();
            uint32_t key0 = dropout.key0, key1 = dropout.key1;
            for (int round = 0; round < kPhiloxRounds; ++round) {
                const __m256i p = _mm256_mul_epu32(a, multiply0), q = _mm256_mul_epu32(c, multiply1);
                a = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), b), _mm256_set1_epi64x(key0));
                c = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), d), _mm256_set1_epi64x(key1));
                b = q;
                d = p;
                key0 += kPhiloxWeyl0;
                key1 += kPhiloxWeyl1;
            }
            const __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
            const __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa);
            const auto at_least = [&](__m256i v) {
                return _mm256_cmpeq_epi16(_mm256_max_epu16(v, threshold), v);
            };
            const __m256i bytes = _mm256_packs_epi16(at_least(_mm256_unpacklo_epi64(ab, cd)),
                                                     at_least(_mm256_unpackhi_epi64(ab, cd)));
            const int bits = _mm256_movemask_epi8(bytes);
            std::memcpy(out + at, &bits, sizeof bits);
        }
    }

    static inline void transpose(Vector (&rows)[kLanes]) { gemm::transpose8(rows); }

    static inline Vector sums(const Vector* v) {
        const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
};

}  // namespace

void fill_avx2(CpuKernels& table) { fill_loops<Avx2>(table); }

}  // namespace simd
}  // namespace peftcore
