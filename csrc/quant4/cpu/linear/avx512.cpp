// AVX-512: 16 words a chunk, and one permutation a lookup, which ignores the index's upper bits.
#include <immintrin.h>

#include "quant4/cpu/linear/integers.h"
#include "quant4/cpu/linear/rows.h"
#include "quant4/cpu/linear/zeros.h"
#include "quant4/cpu/linear/zeros_avx512.h"

namespace peftcore {
namespace quant4 {
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

struct Avx512Integers {
    static constexpr int kRows = 4, kTile = 4;
    using Words = __m512i;
    using Floats = __m512;
    struct Values {
        __m512i of[4];
    };

    static inline Words load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }

    // Repeated, so that an index's fifth bit does not matter.
    struct Table {
        explicit Table(const int16_t* code)
            : code(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)))) {}
        inline Values operator()(Words words) const {
            return {{_mm512_permutexvar_epi16(words, code),
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), code),
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), code),
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), code)}};
        }
        __m512i code;
    };
    // One permutation looks up a nibble of each 16 bits.
    static constexpr int place(int value) {
        const int byte = value / 2, nibble = byte % 2 * 2 + 1 - value % 2;
        return nibble * 32 + byte / 2;
    }

    static inline Floats dot(const Values& w, const int16_t* x) {
        __m512i part[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) part[i] = _mm512_madd_epi16(w.of[i], _mm512_load_si512(x + 32 * i));
        return _mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_add_epi32(part[0], part[1]), _mm512_add_epi32(part[2], part[3])));
    }

    static inline Floats zero() { return _mm512_setzero_ps(); }
    static inline Floats load(const float* from) { return _mm512_load_ps(from); }
    static inline Floats scales(const float* two) {
        return _mm512_mask_broadcastss_ps(_mm512_broadcastss_ps(_mm_load_ss(two)), 0xff00,
                                          _mm_load_ss(two + 1));
    }
    static inline Floats half_scales(const float* four) {
        const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_loadu_ps(four)));
    }
    static inline Floats quarter_scales(const float* eight) {
        const __m512i block = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        return _mm512_permutexvar_ps(block, _mm512_castps256_ps512(_mm256_loadu_ps(eight)));
    }
    static inline Floats quarter_scales(const uint8_t* eight) {
        int64_t bytes;
        memcpy(&bytes, eight, sizeof bytes);
        const auto upper = [](int byte) { return short(byte << 8 | 0x80); };
        const __m256i pick =
            _mm256_setr_epi16(upper(0), upper(0), upper(1), upper(1), upper(2), upper(2), upper(3), upper(3),
                              upper(4), upper(4), upper(5), upper(5), upper(6), upper(6), upper(7), upper(7));
        return _mm512_cvtph_ps(
            _mm256_srli_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), pick), 8 - ByteScales::kPlace));
    }
    // The third byte of a lane is a scale, and the fourth, which the shuffle leaves as it is, the exponent.
    static inline Floats quarter_scales(const NormalScale* eight) {
        int64_t bytes;
        memcpy(&bytes, eight, sizeof bytes);
        const auto third = [](int byte) { return 0x8000'8080 | byte << 16; };
        const __m512i pick =
            _mm512_setr_epi32(third(0), third(0), third(1), third(1), third(2), third(2), third(3), third(3),
                              third(4), third(4), third(5), third(5), third(6), third(6), third(7), third(7));
        const __mmask64 lower = 0x7777'7777'7777'7777;
        const __m512i exponent = _mm512_set1_epi32(NormalScale::kExponent >> 4);
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_mask_shuffle_epi8(exponent, lower, _mm512_set1_epi64(bytes), pick), 4));
    }
    static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
    static inline Floats all(float value) { return _mm512_set1_ps(value); }
    static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(_mm512_abs_ps(b), a); }
    static inline float largest(Floats v) { return _mm512_reduce_max_ps(v); }
    static inline void widen(const Half* from, float* to) {
        _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
    }
    static inline Floats rounded(Floats v, int16_t* out) {
        const __m512i whole = _mm512_cvtps_epi32(v);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(whole));
        return _mm512_cvtepi32_ps(whole);
    }
};

}  // namespace

void fill_avx512(LinearKernels& kernels) {
    kernels.zeros = {.sum_blocks = sum_blocks, .addend = zeros_addend_avx512};
    kernels.integers = LinearIntegers<Avx512Integers>::kernel(24);
    kernels.small_integers = {};
    kernels.rows = LinearRows<Avx512>::kernel({.fp32 = 24, .fp16 = 24, .bf16 = 24});
}

}  // namespace quant4
}  // namespace peftcore
