// AVX2 with FMA: 8 words a chunk.
#include "common/avx2.h"

#include "quant4/cpu/linear/integers.h"
#include "quant4/cpu/linear/rows.h"
#include "quant4/cpu/linear/zeros.h"

namespace peftcore {
namespace quant4 {
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

    static inline float sum(Vector v) { return sum8(v); }
};

struct Avx2Integers {
    static constexpr int kRows = 2, kTile = 3;  // of 16 registers, 6 hold sums and 4 what was looked up
    using Words = __m256i;
    using Floats = __m256;
    struct Values {
        __m256i of[4];
    };

    static inline Words load_words(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }

    struct Nibbles {
        __m256i low, high;
    };
    static inline Nibbles nibbles(Words words) {
        const __m256i nibble = _mm256_set1_epi8(15);
        return {_mm256_and_si256(words, nibble), _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble)};
    }

    struct Table {
        explicit Table(const int16_t* code) {
            alignas(16) uint8_t bytes[2][16];
            for (int i = 0; i < 16; ++i) {
                bytes[0][i] = uint8_t(code[i]);
                bytes[1][i] = uint8_t(code[i] >> 8);
            }
            first = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
            second = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
        }
        inline Values operator()(Words words) const {
            const auto [low, high] = nibbles(words);
            const __m256i a = _mm256_shuffle_epi8(first, low), b = _mm256_shuffle_epi8(second, low),
                          c = _mm256_shuffle_epi8(first, high), d = _mm256_shuffle_epi8(second, high);
            return {{_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b), _mm256_unpacklo_epi8(c, d),
                     _mm256_unpackhi_epi8(c, d)}};
        }
        __m256i first, second;
    };

    // Entries of which the lower bytes are zero.
    struct UpperTable {
        static constexpr bool kFewRegisters = true;
        explicit UpperTable(const int16_t* code) : upper(Table(code).second) {}
        explicit UpperTable(__m256i upper) : upper(upper) {}
        inline Values operator()(Words words) const {
            const auto [low, high] = nibbles(words);
            const __m256i zero = _mm256_setzero_si256(), b = _mm256_shuffle_epi8(upper, low),
                          d = _mm256_shuffle_epi8(upper, high);
            return {{_mm256_unpacklo_epi8(zero, b), _mm256_unpackhi_epi8(zero, b),
                     _mm256_unpacklo_epi8(zero, d), _mm256_unpackhi_epi8(zero, d)}};
        }
        __m256i upper;
    };

    static inline Floats dot(const Values& w, const int16_t* x) {
        __m256i part[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            part[i] =
                _mm256_madd_epi16(w.of[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(x + 16 * i)));
        return _mm256_cvtepi32_ps(
            _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3])));
    }

    static inline Floats zero() { return _mm256_setzero_ps(); }
    static inline Floats load(const float* from) { return _mm256_load_ps(from); }
    static inline Floats scales(const float* one) { return _mm256_broadcast_ss(one); }
    static inline Floats half_scales(const float* two) {
        return _mm256_set_m128(_mm_broadcast_ss(two + 1), _mm_broadcast_ss(two));
    }
    static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static inline float sum(Floats v) { return sum8(v); }
    static inline Floats all(float value) { return _mm256_set1_ps(value); }
    static inline Floats larger(Floats a, Floats b) {
        return _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), b), a);
    }
    static inline float largest(Floats v) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    static inline void widen(const Half* from, float* to) { _mm256_storeu_ps(to, load8(from)); }
    static inline Floats rounded(Floats v, int16_t* out) {
        const __m256i whole = _mm256_cvtps_epi32(v);
        const __m128i short_ones =
            _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), short_ones);
        return _mm256_cvtepi32_ps(whole);
    }
};

// A lane of 32 bits has products of one word, and so of one block of 16: of vectors of 16 bits the first two have the low
// nibbles of even and of odd bytes, the others the high ones.
struct Avx2SmallIntegers : Avx2Integers {
    static constexpr int place(int value) {
        const int byte = value / 2;
        return (2 * (1 - value % 2) + byte % 2) * 16 + byte / 2;
    }

    struct UpperTable : Avx2Integers::UpperTable {
        using Avx2Integers::UpperTable::UpperTable;
        inline Values operator()(Words words) const {
            const auto [low, high] = nibbles(words);
            const __m256i odd = _mm256_set1_epi16(short(0xff00)), b = _mm256_shuffle_epi8(upper, low),
                          d = _mm256_shuffle_epi8(upper, high);
            return {{_mm256_slli_epi16(b, 8), _mm256_and_si256(b, odd), _mm256_slli_epi16(d, 8),
                     _mm256_and_si256(d, odd)}};
        }
    };

    struct Table : Avx2Integers::Table {
        using Avx2Integers::Table::Table;
        inline Values operator()(Words words) const {
            const auto [low, high] = nibbles(words);
            const Values upper = UpperTable(second)(words);
            const __m256i even = _mm256_set1_epi16(0xff), a = _mm256_shuffle_epi8(first, low),
                          c = _mm256_shuffle_epi8(first, high);
            return {{_mm256_or_si256(upper.of[0], _mm256_and_si256(a, even)),
                     _mm256_or_si256(upper.of[1], _mm256_srli_epi16(a, 8)),
                     _mm256_or_si256(upper.of[2], _mm256_and_si256(c, even)),
                     _mm256_or_si256(upper.of[3], _mm256_srli_epi16(c, 8))}};
        }
    };

    static inline Floats quarter_scales(const float* four) {
        const __m256i block = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
        return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(four)), block);
    }
    static inline Floats quarter_scales(const uint8_t* four) {
        int32_t bytes;
        memcpy(&bytes, four, sizeof bytes);
        const auto upper = [](int byte) { return short(byte << 8 | 0x80); };
        const __m128i pick =
            _mm_setr_epi16(upper(0), upper(0), upper(1), upper(1), upper(2), upper(2), upper(3), upper(3));
        return _mm256_cvtph_ps(
            _mm_srli_epi16(_mm_shuffle_epi8(_mm_cvtsi32_si128(bytes), pick), 8 - ByteScales::kPlace));
    }
    // The third byte of a lane is a scale.
    static inline Floats quarter_scales(const NormalScale* four) {
        int32_t bytes;
        memcpy(&bytes, four, sizeof bytes);
        const auto third = [](int byte) { return 0x8000'8080 | byte << 16; };
        const __m256i pick =
            _mm256_setr_epi32(third(0), third(0), third(1), third(1), third(2), third(2), third(3), third(3));
        const __m256i picked = _mm256_slli_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), pick), 4);
        return _mm256_castsi256_ps(_mm256_or_si256(picked, _mm256_set1_epi32(NormalScale::kExponent)));
    }
};

}  // namespace

void fill_avx2(LinearKernels& kernels) {
    kernels.zeros = kZeroPoints;
    kernels.integers = LinearIntegers<Avx2Integers>::kernel(32);
    kernels.small_integers = LinearIntegers<Avx2SmallIntegers>::kernel(32);
    kernels.rows = LinearRows<Avx2>::kernel({.fp32 = 16, .fp16 = 16, .bf16 = 16});
}

}  // namespace quant4
}  // namespace peftcore
