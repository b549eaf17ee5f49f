// AVX-512: 16 words a chunk, and one permutation a lookup, which ignores the index's upper bits.
#include <immintrin.h>

#include "nf4/cpu/linear/rows.h"

namespace peftcore {
namespace nf4 {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16, kRows = 2;
    using Vector = __m512;
    using Words = __m512i;

    static inline Vector zero() { return _mm512_setzero_ps(); }
    static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

    static inline Words load_words(const uint8_t* from, int count) {
        if (count == kLanes) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), from);
    }

    struct Table {
        explicit Table(const float* code) : code(_mm512_loadu_ps(code)) {}
        inline Vector operator()(Words words, int shift) const {
            return _mm512_permutexvar_ps(_mm512_srli_epi32(words, unsigned(shift)), code);
        }
        __m512 code;
    };

    static inline Vector scales(const float* from, int64_t within, int shift) {
        const __m512i offset =
            _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
        const __m512i index = _mm512_srl_epi32(_mm512_add_epi32(_mm512_set1_epi32(int(within)), offset),
                                               _mm_cvtsi32_si128(shift));
        return _mm512_permutexvar_ps(index, _mm512_loadu_ps(from));
    }

    static inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
};

}  // namespace

void fill_avx512(LinearKernels& kernels) {
    kernels.rows = LinearRows<Avx512>::kernel({.fp32 = 24, .fp16 = 32, .bf16 = 8});
}

}  // namespace nf4
}  // namespace peftcore
