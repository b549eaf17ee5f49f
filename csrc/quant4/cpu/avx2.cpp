// AVX2 with F16C: 8 fp32 values a register, by the same steps as AVX-512.
#include "quant4/cpu/avx2.h"

#include "quant4/cpu/blocks.h"

namespace peftcore {
namespace quant4 {
namespace {

inline void store(void* out, __m256i value, bool stream) {
    if (stream)
        _mm256_stream_si256(static_cast<__m256i*>(out), value);
    else
        _mm256_storeu_si256(static_cast<__m256i*>(out), value);
}

struct Avx2 {
    // Comparisons give -1, so a search position is minus its index, and a table of 8 is addressed modulo 8.
    struct Encoder {
        explicit Encoder(const Codebook& book) {
            float tree[3][8] = {};
            for (int i = 0; i < 2; ++i) tree[0][(8 - i) & 7] = book.threshold[8 * i + 3];
            for (int i = 0; i < 4; ++i) tree[1][(8 - i) & 7] = book.threshold[4 * i + 1];
            for (int i = 0; i < 8; ++i) tree[2][(8 - i) & 7] = book.threshold[2 * i];
            step8 = _mm256_set1_ps(book.threshold[7]);
            step4 = _mm256_loadu_ps(tree[0]);
            step2 = _mm256_loadu_ps(tree[1]);
            step1 = _mm256_loadu_ps(tree[2]);
            order =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.order)));
        }
        __m256 step8, step4, step2, step1;
        __m256i order;
    };

    struct Decoder {
        explicit Decoder(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
        __m256 low, high;
    };

    template <typename T>
    static inline uint32_t absmax_bits(const T* x, int64_t count) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int64_t i = 0; i < count; i += 16) {
            a = _mm256_max_epu32(a, _mm256_and_si256(_mm256_castps_si256(load8(x + i)), magnitude));
            b = _mm256_max_epu32(b, _mm256_and_si256(_mm256_castps_si256(load8(x + i + 8)), magnitude));
        }
        a = _mm256_max_epu32(a, b);
        __m128i c = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4e));
        c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0xb1));
        return uint32_t(_mm_cvtsi128_si32(c));
    }

    static inline __m256i compare(__m256 value, __m256 threshold) {
        return _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_NLE_UQ));
    }

    // The negated rank of each of 8 values.
    static inline __m256i negative_rank(__m256 value, const Encoder& encoder) {
        __m256i index = compare(value, encoder.step8);
        __m256i bit = compare(value, _mm256_permutevar8x32_ps(encoder.step4, index));
        index = _mm256_add_epi32(_mm256_add_epi32(index, index), bit);
        bit = compare(value, _mm256_permutevar8x32_ps(encoder.step2, index));
        index = _mm256_add_epi32(_mm256_add_epi32(index, index), bit);
        bit = compare(value, _mm256_permutevar8x32_ps(encoder.step1, index));
        return _mm256_add_epi32(_mm256_add_epi32(index, index), bit);
    }

    template <typename T>
    static inline void encode(const T* x, int64_t count, float inverse, const Encoder& encoder,
                              uint8_t* out) {
        const __m256 factor = _mm256_set1_ps(inverse);
        for (int64_t i = 0; i < count; i += 32) {
            const __m256i a = negative_rank(_mm256_mul_ps(load8(x + i), factor), encoder);
            const __m256i b = negative_rank(_mm256_mul_ps(load8(x + i + 8), factor), encoder);
            const __m256i c = negative_rank(_mm256_mul_ps(load8(x + i + 16), factor), encoder);
            const __m256i d = negative_rank(_mm256_mul_ps(load8(x + i + 24), factor), encoder);
            const __m256i negative = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i ranks =
                _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_permutevar8x32_epi32(negative, lanes));
            const __m256i codes = _mm256_shuffle_epi8(encoder.order, ranks);
            const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), _mm256_castsi256_si128(bytes));
        }
    }

    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              float* out, bool stream) {
        const FloatTable table(decoder.low, decoder.high, scale);
        for (int64_t i = 0; i < count; i += 8)
            store(out + i, _mm256_castps_si256(decoded8(packed + i / 2, table)), stream);
    }

    // 16-bit values are looked up as two tables of bytes.
    template <typename T>
    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              T* out, bool stream) {
        const __m256 factor = _mm256_set1_ps(scale);
        const __m128i first = round_to(_mm256_mul_ps(decoder.low, factor), out);
        const __m128i second = round_to(_mm256_mul_ps(decoder.high, factor), out);
        const __m128i mask = _mm_set1_epi16(0xff);
        const __m256i low_bytes = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask)));
        const __m256i high_bytes = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
        const __m256i nibble = _mm256_set1_epi8(15);
        for (int64_t i = 0; i < count; i += 32) {
            // A byte becomes 16 bits: byte >> 4 below, byte & 15 above. 16 bytes give the 32 indices in
            // order.
            const __m256i bytes =
                _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
            const __m256i index = _mm256_and_si256(
                _mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8)), nibble);
            const __m256i low = _mm256_shuffle_epi8(low_bytes, index);
            const __m256i high = _mm256_shuffle_epi8(high_bytes, index);
            // Within lanes: values 0-7 and 16-23, then 8-15 and 24-31.
            const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
            store(out + i, _mm256_permute2x128_si256(even, odd, 0x20), stream);
            store(out + i + 16, _mm256_permute2x128_si256(even, odd, 0x31), stream);
        }
    }

    static void fence() { _mm_sfence(); }
};

}  // namespace

void fill_avx2(Kernels& kernels) { kernels = kernels_of<Avx2>(); }

}  // namespace quant4
}  // namespace peftcore
