// AVX2 with FMA: 8 fp32 values a register. Maps and encoders are read by gathers.
#include "common/avx2.h"

#include "optim/cpu/loops.h"

namespace peftcore {
namespace optim {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int kWidth = 8;
    static inline F load(const float* x) { return _mm256_loadu_ps(x); }
    static inline void store(float* out, F x) { _mm256_storeu_ps(out, x); }
    static inline F set1(float x) { return _mm256_set1_ps(x); }
    static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
    static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
    static inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static inline F sign(F a) {
        const F zero = _mm256_setzero_ps();
        const F unit = _mm256_or_ps(_mm256_and_ps(a, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
        return _mm256_blendv_ps(a, unit, _mm256_cmp_ps(a, zero, _CMP_NEQ_OQ));  // zero and NaN stay
    }

    static const float* signed_table() { return signed_map().value; }
    static const float* unsigned_table() { return unsigned_map().value; }

    static inline F where_zero(F x, F d) {
        return _mm256_and_ps(x, _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_EQ_OQ));
    }

    struct Largest {
        __m256i bits = _mm256_setzero_si256();
        void take(F x) {
            bits = _mm256_max_epu32(bits,
                                    _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
        }
        float value() const {
            __m128i c = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
            c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4e));
            c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0xb1));
            return bits_float(uint32_t(_mm_cvtsi128_si32(c)));
        }
    };

    static constexpr int kChunk = 8;
    static inline void decode(const uint8_t* codes, const float* table, float absmax, F* out) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        *out = mul(_mm256_i32gather_ps(table, index, 4), set1(absmax));
    }

    static inline __m256i magnitude(F a, const Encoder& encoder) {
        const F raised = _mm256_max_ps(a, set1(kSmallestMagnitude));
        const __m256i exponent =
            _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(raised), 24), _mm256_set1_epi32(15));
        const F above =
            _mm256_cmp_ps(raised, _mm256_i32gather_ps(encoder.threshold, exponent, 4), _CMP_GT_OQ);
        const __m256i row =
            _mm256_add_epi32(exponent, _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(16)));
        const F part = add(mul(raised, _mm256_i32gather_ps(encoder.slope, row, 4)), set1(kEightNinths));
        return _mm256_cvttps_epi32(
            mul(_mm256_min_ps(part, set1(kBelowTwo)), _mm256_i32gather_ps(encoder.parts, row, 4)));
    }

    template <bool kSigned>
    static inline void encode(const float* x, float inverse, const Encoder& encoder, uint8_t* codes) {
        const F factor = set1(inverse), sign_bit = set1(-0.0f);
        for (int i = 0; i < kBlock; i += 8) {
            const F scaled = mul(load(x + i), factor);
            const __m256i n = magnitude(kSigned ? _mm256_andnot_ps(sign_bit, scaled) : scaled, encoder);
            __m256i code;
            if constexpr (kSigned) {
                const __m256i negative =
                    _mm256_castps_si256(_mm256_cmp_ps(scaled, _mm256_setzero_ps(), _CMP_LT_OQ));
                code = _mm256_add_epi32(_mm256_set1_epi32(127),
                                        _mm256_sub_epi32(_mm256_xor_si256(n, negative), negative));
                code = _mm256_max_epi32(code, _mm256_setzero_si256());
            } else {
                const __m256i above =
                    _mm256_castps_si256(_mm256_cmp_ps(scaled, _mm256_setzero_ps(), _CMP_GT_OQ));
                code = _mm256_and_si256(above, _mm256_sub_epi32(n, _mm256_set1_epi32(1)));
            }
            const __m128i words =
                _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packus_epi16(words, words));
        }
    }

    static inline F widen_half(const uint16_t* x) { return load8(reinterpret_cast<const Half*>(x)); }
    static inline F widen_bfloat16(const uint16_t* x) { return load8(reinterpret_cast<const BFloat16*>(x)); }
    static inline void narrow_half(F x, uint16_t* out) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_to(x, static_cast<const Half*>(nullptr)));
    }
    static inline void narrow_bfloat16(F x, uint16_t* out) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_to(x, static_cast<const BFloat16*>(nullptr)));
    }
};

}  // namespace

void fill_avx2(Kernels& kernels) { kernels = kernels_of<Avx2>(); }

}  // namespace optim
}  // namespace peftcore
