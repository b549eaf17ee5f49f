// AVX-512 (F, BW, VL, DQ): 16 fp32 values a register. Codes are looked up in registers: the map as two tables
// of 256 words, the upper and lower halves of its values; the encoder's tables as they are.
#include <immintrin.h>

#include "optim/cpu/loops.h"

namespace peftcore {
namespace optim {
namespace {

struct Table {
    explicit Table(const float* value) {
        for (int i = 0; i < 256; ++i) {
            low[i] = uint16_t(float_bits(value[i]));
            high[i] = uint16_t(float_bits(value[i]) >> 16);
        }
    }
    alignas(64) uint16_t low[256];
    alignas(64) uint16_t high[256];
};

struct Avx512 {
    using F = __m512;
    static constexpr int kWidth = 16;
    static inline F load(const float* x) { return _mm512_loadu_ps(x); }
    static inline void store(float* out, F x) { _mm512_storeu_ps(out, x); }
    static inline F set1(float x) { return _mm512_set1_ps(x); }
    static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
    static inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline F sign(F a) {
        const F unit = _mm512_or_ps(_mm512_and_ps(a, set1(-0.0f)), set1(1.0f));
        const __mmask16 moves = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        return _mm512_mask_mov_ps(a, moves, unit);  // zero and NaN stay
    }

    static const Table& signed_table() {
        static const Table table(signed_map().value);
        return table;
    }
    static const Table& unsigned_table() {
        static const Table table(unsigned_map().value);
        return table;
    }

    struct Largest {
        __m512i bits = _mm512_setzero_si512();
        void take(F x) {
            const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
            bits = _mm512_max_epu32(bits, magnitude);
        }
        float value() const { return bits_float(_mm512_reduce_max_epu32(bits)); }
    };

    // The words of a table for 32 indices below 256; `bit6` and `bit7` are those bits of the indices.
    static inline __m512i words_of(const uint16_t* table, __m512i index, __mmask32 bit6, __mmask32 bit7) {
        const auto part = [&](int i) { return _mm512_load_si512(table + 32 * i); };
        const __m512i a = _mm512_permutex2var_epi16(part(0), index, part(1));
        const __m512i b = _mm512_permutex2var_epi16(part(2), index, part(3));
        const __m512i c = _mm512_permutex2var_epi16(part(4), index, part(5));
        const __m512i d = _mm512_permutex2var_epi16(part(6), index, part(7));
        return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b),
                                       _mm512_mask_blend_epi16(bit6, c, d));
    }

    static constexpr int kChunk = 32;
    static inline void decode(const uint8_t* codes, const Table& table, float absmax, F* out) {
        const __m512i index =
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
        const __m512i low = words_of(table.low, index, bit6, bit7);
        const __m512i high = words_of(table.high, index, bit6, bit7);
        // Unpacking works within 128-bit lanes; one permutation of pairs restores the order.
        const __m512i a = _mm512_unpacklo_epi16(low, high), b = _mm512_unpackhi_epi16(low, high);
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        out[0] = mul(_mm512_castsi512_ps(_mm512_permutex2var_epi64(a, front, b)), set1(absmax));
        out[1] = mul(_mm512_castsi512_ps(_mm512_permutex2var_epi64(a, back, b)), set1(absmax));
    }

    struct Tables {
        explicit Tables(const Encoder& e)
            : threshold0(_mm512_loadu_ps(e.threshold)),
              threshold1(_mm512_loadu_ps(e.threshold + 16)),
              slope(_mm512_loadu_ps(e.slope)),
              shift(_mm512_loadu_ps(e.shift)),
              last(_mm512_loadu_ps(e.last)),
              base0(_mm512_loadu_si512(e.base)),
              base1(_mm512_loadu_si512(e.base + 16)) {}
        F threshold0, threshold1, slope, shift, last;
        __m512i base0, base1;
    };

    static inline __m512i magnitude(F a, const Tables& t) {
        const F raised = _mm512_max_ps(a, set1(kSmallestMagnitude));
        const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(raised), 23);
        const F threshold = _mm512_permutex2var_ps(t.threshold0, exponent, t.threshold1);
        const __m512i base = _mm512_permutex2var_epi32(t.base0, exponent, t.base1);
        const __mmask16 above = _mm512_cmp_ps_mask(raised, threshold, _CMP_GT_OQ);
        const __m512i decade = _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
        const F n =
            add(mul(raised, _mm512_permutexvar_ps(decade, t.slope)), _mm512_permutexvar_ps(decade, t.shift));
        return _mm512_cvttps_epi32(_mm512_min_ps(n, _mm512_permutexvar_ps(decade, t.last)));
    }

    template <bool kSigned>
    static inline void encode(const float* x, float inverse, const Encoder& encoder, uint8_t* codes) {
        const Tables tables(encoder);
        const F factor = set1(inverse);
        const __m512i zero = _mm512_set1_epi32(127), one = _mm512_set1_epi32(1);
        for (int i = 0; i < kBlock; i += 16) {
            const F scaled = mul(load(x + i), factor);
            __m512i code;
            if constexpr (kSigned) {
                const __m512i n = magnitude(_mm512_abs_ps(scaled), tables);
                const __mmask16 negative = _mm512_cmp_ps_mask(scaled, _mm512_setzero_ps(), _CMP_LT_OQ);
                code = _mm512_add_epi32(zero, n);
                code = _mm512_mask_sub_epi32(code, negative, zero, n);
                code = _mm512_max_epi32(code, _mm512_setzero_si512());
            } else {
                const __mmask16 above = _mm512_cmp_ps_mask(scaled, _mm512_setzero_ps(), _CMP_GT_OQ);
                code = _mm512_maskz_sub_epi32(above, magnitude(scaled, tables), one);
            }
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
        }
    }

    static inline __m256i words(const uint16_t* x) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    }
    static inline F widen_half(const uint16_t* x) { return _mm512_cvtph_ps(words(x)); }
    static inline F widen_bfloat16(const uint16_t* x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words(x)), 16));
    }
    static inline void narrow_half(F x, uint16_t* out) {
        const __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
    }
    static inline void narrow_bfloat16(F x, uint16_t* out) {
        // Not vcvtneps2bf16: it flushes subnormals to zero.
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i result =
            _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(result));
    }
};

}  // namespace

Kernels avx512_kernels() { return kernels_of<Avx512>(); }

}  // namespace optim
}  // namespace peftcore
