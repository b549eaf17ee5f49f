// AVX2 with FMA: 8 words a chunk.
#include <immintrin.h>

#include "nf4/cpu/linear/rows.h"

namespace peftcore {
namespace nf4 {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8, kRows = 1;  // of 16 registers, 8 hold sums
    using Vector = __m256;
    using Words = __m256i;

    static inline Vector zero() { return _mm256_setzero_ps(); }
    static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

    static inline Words load_words(const uint8_t* from, int count) {
        if (count == kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_epi32(reinterpret_cast<const int*>(from),
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
    }

    struct Table {
        explicit Table(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
        inline Vector operator()(Words words, int shift) const {
            const __m256i index = _mm256_srli_epi32(words, shift);
            const __m256 upper =
                _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - shift));  // bit 3 as the sign
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                    _mm256_permutevar8x32_ps(high, index), upper);
        }
        __m256 low, high;
    };

    static inline Vector scales(const float* from, int64_t within, int shift) {
        const __m256i offset = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
        const __m256i index = _mm256_srl_epi32(_mm256_add_epi32(_mm256_set1_epi32(int(within)), offset),
                                               _mm_cvtsi32_si128(shift));
        return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), index);
    }

    static inline float sum(Vector v) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};

}  // namespace

void fill_avx2(LinearKernels& kernels) {
    kernels.rows = LinearRows<Avx2>::kernel({.fp32 = 12, .fp16 = 16, .bf16 = 4});
}

}  // namespace nf4
}  // namespace peftcore
