// AVX-512 (F, BW, VL, DQ): 16 fp32 values a register. Codes are looked up in registers: the map as two tables
// of 256 words, the upper and lower halves of its values; the encoder's tables as they are.
#include "common/avx512.h"

#include "optim/cpu/loops.h"

namespace peftcore {
namespace optim {
namespace {

// `count` values from `value` on.
template <int count>
struct Table {
    explicit Table(const float* value) {
        for (int i = 0; i < count; ++i) {
            low[i] = uint16_t(float_bits(value[i]));
            high[i] = uint16_t(float_bits(value[i]) >> 16);
        }
    }
    alignas(64) uint16_t low[count];
    alignas(64) uint16_t high[count];
};
using SignedTable = Table<128>;  // of magnitudes 0 to 127; 128 is 1
using UnsignedTable = Table<256>;

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

    static inline F where_zero(F x, F d) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_EQ_OQ), x);
    }

    static const SignedTable& signed_table() {
        static const SignedTable table(signed_map().value + 127);
        return table;
    }
    static const UnsignedTable& unsigned_table() {
        static const UnsignedTable table(unsigned_map().value);
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

    // The words of a table for 32 indices below 128, `bit6` of which is given.
    static inline __m512i words_of(const uint16_t* table, __m512i index, __mmask32 bit6) {
        const auto part = [&](int i) { return _mm512_load_si512(table + 32 * i); };
        return _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part(0), index, part(1)),
                                       _mm512_permutex2var_epi16(part(2), index, part(3)));
    }

    // 64 codes as words, in the order in which unpacking within 128-bit lanes gives values 0 to 63.
    static inline void words_of_codes(const uint8_t* codes, __m512i* words) {
        const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        const __m512i permuted = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
        words[0] = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(permuted));
        words[1] = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(permuted, 1));
    }

    static inline void scale(__m512i low, __m512i high, float absmax, F* out) {
        out[0] = mul(_mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)), set1(absmax));
        out[1] = mul(_mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)), set1(absmax));
    }

    // Two registers of indices a call, so that a table is loaded once for both.
    static constexpr int kChunk = 64;
    static inline void decode(const uint8_t* codes, const SignedTable& table, float absmax, F* out) {
        __m512i index[2], low[2], high[2];
        words_of_codes(codes, index);
        for (int i = 0; i < 2; ++i) {
            const __m512i n = _mm512_sub_epi16(index[i], _mm512_set1_epi16(127));
            const __m512i magnitude = _mm512_abs_epi16(n);
            const __mmask32 bit6 = _mm512_test_epi16_mask(magnitude, _mm512_set1_epi16(64));
            const __mmask32 one = _mm512_test_epi16_mask(magnitude, _mm512_set1_epi16(128));
            low[i] = words_of(table.low, magnitude, bit6);
            high[i] =
                _mm512_mask_mov_epi16(words_of(table.high, magnitude, bit6), one, _mm512_set1_epi16(0x3f80));
            high[i] = _mm512_or_si512(high[i], _mm512_and_si512(n, _mm512_set1_epi16(-0x8000)));
        }
        for (int i = 0; i < 2; ++i) scale(low[i], high[i], absmax, out + 2 * i);
    }
    static inline void decode(const uint8_t* codes, const UnsignedTable& table, float absmax, F* out) {
        __m512i index[2], low[2], high[2];
        words_of_codes(codes, index);
        for (int i = 0; i < 2; ++i) {
            const __mmask32 bit6 = _mm512_test_epi16_mask(index[i], _mm512_set1_epi16(64));
            const __mmask32 bit7 = _mm512_test_epi16_mask(index[i], _mm512_set1_epi16(128));
            low[i] = _mm512_mask_blend_epi16(bit7, words_of(table.low, index[i], bit6),
                                             words_of(table.low + 128, index[i], bit6));
            high[i] = _mm512_mask_blend_epi16(bit7, words_of(table.high, index[i], bit6),
                                              words_of(table.high + 128, index[i], bit6));
        }
        for (int i = 0; i < 2; ++i) scale(low[i], high[i], absmax, out + 2 * i);
    }

    struct Tables {
        explicit Tables(const Encoder& e)
            : threshold(_mm512_loadu_ps(e.threshold)),
              slope(_mm512_loadu_ps(e.slope)),
              slope_above(_mm512_loadu_ps(e.slope + 16)),
              parts(_mm512_loadu_ps(e.parts)),
              parts_above(_mm512_loadu_ps(e.parts + 16)) {}
        F threshold, slope, slope_above, parts, parts_above;
    };

    // n of encode_magnitude, before it is truncated.
    static inline F magnitude(F a, const Tables& t) {
        const F raised = _mm512_max_ps(a, set1(kSmallestMagnitude));
        // Bit 4 of an exponent below 2 is set: it selects the second table.
        const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(raised), 24);
        const __mmask16 above =
            _mm512_cmp_ps_mask(raised, _mm512_permutexvar_ps(exponent, t.threshold), _CMP_GT_OQ);
        const __m512i row = _mm512_mask_xor_epi32(exponent, above, exponent, _mm512_set1_epi32(16));
        const F slope = _mm512_permutex2var_ps(t.slope_above, row, t.slope);
        const F parts = _mm512_permutex2var_ps(t.parts_above, row, t.parts);
        return mul(_mm512_min_ps(add(mul(raised, slope), set1(kEightNinths)), set1(kBelowTwo)), parts);
    }

    template <bool kSigned>
    static inline void encode(const float* x, float inverse, const Encoder& encoder, uint8_t* codes) {
        const Tables tables(encoder);
        const F factor = set1(inverse);
        for (int i = 0; i < kBlock; i += 64) {
            __m512i n[4];
            for (int part = 0; part < 4; ++part) {
                const F scaled = mul(load(x + i + 16 * part), factor);
                if constexpr (kSigned) {
                    const F sign = _mm512_and_ps(scaled, set1(-0.0f));
                    n[part] =
                        _mm512_cvttps_epi32(_mm512_or_ps(magnitude(_mm512_abs_ps(scaled), tables), sign));
                } else {
                    const __mmask16 above = _mm512_cmp_ps_mask(scaled, _mm512_setzero_ps(), _CMP_GT_OQ);
                    n[part] = _mm512_maskz_cvttps_epi32(above, magnitude(scaled, tables));
                }
            }
            // Saturation makes code 0 of -128, which the map lacks. Packing works within 128-bit lanes.
            const auto code = [](__m512i a, __m512i b) {
                const __m512i both = _mm512_packs_epi32(a, b);
                return kSigned ? _mm512_add_epi16(both, _mm512_set1_epi16(127))
                               : _mm512_subs_epu16(both, _mm512_set1_epi16(1));
            };
            const __m512i packed = _mm512_packus_epi16(code(n[0], n[1]), code(n[2], n[3]));
            const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, packed));
        }
    }

    static inline __m256i words(const uint16_t* x) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    }
    static inline F widen_half(const uint16_t* x) { return _mm512_cvtph_ps(words(x)); }
    static inline F widen_bfloat16(const uint16_t* x) { return from_bf16(words(x)); }
    static inline void narrow_half(F x, uint16_t* out) {
        const __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
    }
    static inline void narrow_bfloat16(F x, uint16_t* out) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_bf16(x));
    }
};

}  // namespace

void fill_avx512(Kernels& kernels) { kernels = kernels_of<Avx512>(); }

}  // namespace optim
}  // namespace peftcore
