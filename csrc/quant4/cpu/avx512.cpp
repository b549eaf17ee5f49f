// AVX-512 (F, BW, VL, DQ): 16 fp32 values a register.
//
// Encoding is a binary search over the 15 thresholds with the table of each step in one register. Decoding
// scales the 16 entries once a block, rounds them once, and looks values up in the result.
#include "common/avx512.h"

#include "quant4/cpu/blocks.h"

namespace peftcore {
namespace quant4 {
namespace {

// The 16 scaled entries rounded to 16 bits, repeated, so that an index's fifth bit does not matter.
inline __m512i round_to(__m512 values, const Half*) {
    const __m256i half = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_broadcast_i64x4(half);
}
inline __m512i round_to(__m512 values, const BFloat16*) { return _mm512_broadcast_i64x4(to_bf16(values)); }

inline void store(void* out, __m512i value, bool stream) {
    if (stream)
        _mm512_stream_si512(static_cast<__m512i*>(out), value);
    else
        _mm512_storeu_si512(out, value);
}

struct Avx512 {
    struct Encoder {
        explicit Encoder(const Codebook& book) {
            float tree[4][16];
            for (int i = 0; i < 16; ++i) {
                tree[0][i] = book.threshold[7];
                tree[1][i] = book.threshold[(i & 8) + 3];
                tree[2][i] = book.threshold[(i & 12) + 1];
                tree[3][i] = book.threshold[i & 14];
            }
            step8 = _mm512_loadu_ps(tree[0]);
            step4 = _mm512_loadu_ps(tree[1]);
            step2 = _mm512_loadu_ps(tree[2]);
            step1 = _mm512_loadu_ps(tree[3]);
            order = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.order)));
        }
        __m512 step8, step4, step2, step1;
        __m512i order;
    };

    struct Decoder {
        explicit Decoder(const float* code) : code(_mm512_loadu_ps(code)) {}
        __m512 code;
    };

    template <typename T>
    static inline uint32_t absmax_bits(const T* x, int64_t count) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __m512i a = _mm512_setzero_si512(), b = a;
        for (int64_t i = 0; i < count; i += 32) {
            a = _mm512_max_epu32(a, _mm512_and_si512(_mm512_castps_si512(load16(x + i)), magnitude));
            b = _mm512_max_epu32(b, _mm512_and_si512(_mm512_castps_si512(load16(x + i + 16)), magnitude));
        }
        return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
    }

    // The rank of each of 16 values; _CMP_NLE_UQ is true for NaN.
    static inline __m512i rank(__m512 value, const Encoder& encoder) {
        __m512i index = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(value, encoder.step8, _CMP_NLE_UQ), 8);
        __m512 threshold = _mm512_permutexvar_ps(index, encoder.step4);
        index = _mm512_mask_or_epi32(index, _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ), index,
                                     _mm512_set1_epi32(4));
        threshold = _mm512_permutexvar_ps(index, encoder.step2);
        index = _mm512_mask_or_epi32(index, _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ), index,
                                     _mm512_set1_epi32(2));
        threshold = _mm512_permutexvar_ps(index, encoder.step1);
        return _mm512_mask_or_epi32(index, _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ), index,
                                    _mm512_set1_epi32(1));
    }

    template <typename T>
    static inline void encode(const T* x, int64_t count, float inverse, const Encoder& encoder,
                              uint8_t* out) {
        const __m512 factor = _mm512_set1_ps(inverse);
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) {
            const __m512i a = rank(_mm512_mul_ps(load16(x + i), factor), encoder);
            const __m512i b = rank(_mm512_mul_ps(load16(x + i + 16), factor), encoder);
            const __m512i c = rank(_mm512_mul_ps(load16(x + i + 32), factor), encoder);
            const __m512i d = rank(_mm512_mul_ps(load16(x + i + 48), factor), encoder);
            // Packing works within 128-bit lanes; one permutation of dwords restores the order.
            const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
            const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            const __m512i codes = _mm512_shuffle_epi8(encoder.order, _mm512_permutexvar_epi32(lanes, bytes));
            const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), _mm512_cvtepi16_epi8(pairs));
        }
        if (i < count) {  // block size 32
            const __m128i a = _mm512_cvtepi32_epi8(rank(_mm512_mul_ps(load16(x + i), factor), encoder));
            const __m128i b = _mm512_cvtepi32_epi8(rank(_mm512_mul_ps(load16(x + i + 16), factor), encoder));
            const __m256i codes =
                _mm256_shuffle_epi8(_mm512_castsi512_si256(encoder.order), _mm256_set_m128i(b, a));
            const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), _mm256_cvtepi16_epi8(pairs));
        }
    }

    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              float* out, bool stream) {
        const __m512 table = _mm512_mul_ps(decoder.code, _mm512_set1_ps(scale));
        for (int64_t i = 0; i < count; i += 16) {
            // A byte becomes two dwords: byte >> 4, then byte, of which the permutation reads the low 4 bits.
            const __m512i bytes =
                _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
            store(out + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)), stream);
        }
    }

    template <typename T>
    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              T* out, bool stream) {
        const __m512i table = round_to(_mm512_mul_ps(decoder.code, _mm512_set1_ps(scale)), out);
        for (int64_t i = 0; i < count; i += 32) {
            const __m512i bytes =
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
            store(out + i, _mm512_permutexvar_epi16(index, table), stream);
        }
    }

    static void fence() { _mm_sfence(); }
};

}  // namespace

void fill_avx512(Kernels& kernels) { kernels = kernels_of<Avx512>(); }

}  // namespace quant4
}  // namespace peftcore
