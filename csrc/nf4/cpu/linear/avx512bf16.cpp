// The "tile" way (see kernels.h) on AVX-512 with bf16 dot products: 32 rows of W by 8 of x in registers.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 begins with the nibble of a value, so that one
// permutation turns 16 words of 16 rows into 32 bf16 values: (1, 5), (0, 4), (3, 7) and (2, 6) of the eight
// that a word holds. x is arranged in the same pairs and broadcast.
#include <immintrin.h>

#include <vector>

#include "nf4/cpu/linear/kernels.h"

namespace peftcore {
namespace nf4 {
namespace {

constexpr int kVectors = 2, kRows = 16 * kVectors;
constexpr int kStep = 64, kHalfStep = 32;  // columns that share a scale
constexpr int kTile = 8;                   // rows of x
constexpr int kPair[4] = {1, 0, 3, 2};     // and the value 4 places on

int64_t arranged_bytes(int64_t batch, int64_t columns) { return batch * columns * int64_t(sizeof(uint16_t)); }

// [columns / 2 pairs][batch] of two values.
void arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    uint32_t* to = static_cast<uint32_t*>(out);
    for (int64_t k = 0; k < columns; k += 8)
        for (int pair : kPair)
            for (int64_t m = 0; m < batch; ++m) {
                const uint16_t* row = from + m * columns + k + pair;
                *to++ = uint32_t(row[0]) | uint32_t(row[4]) << 16;
            }
}

inline __m512i four_rows(const uint8_t* const* rows, int64_t offset) {
    const auto at = [&](int i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
    };
    __m512i result = _mm512_castsi128_si512(at(0));
    result = _mm512_inserti32x4(result, at(4), 1);
    result = _mm512_inserti32x4(result, at(8), 2);
    return _mm512_inserti32x4(result, at(12), 3);
}

// 32 columns of 16 rows, as 16 vectors of pairs, `stride` vectors apart.
inline void decode(const uint8_t* const* rows, int64_t offset, __m512i table, __m512i* out, int stride) {
    const __m512i a = four_rows(rows, offset), b = four_rows(rows + 1, offset);
    const __m512i c = four_rows(rows + 2, offset), d = four_rows(rows + 3, offset);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    const __m512i words[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                              _mm512_unpacklo_epi64(ab_high, cd_high),
                              _mm512_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        out[(4 * i + 0) * stride] = _mm512_permutexvar_epi16(words[i], table);
        out[(4 * i + 1) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4), table);
        out[(4 * i + 2) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 8), table);
        out[(4 * i + 3) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 12), table);
    }
}

// sums[m][row] += scale[row] * (values x), over `pairs` pairs of columns.
template <int kCount>
inline void multiply(const __m512i* values, int pairs, const uint32_t* x, int64_t batch, const __m512* scale,
                     float* sums) {
    __m512 part[kCount][kVectors];
    for (auto& row : part)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int p = 0; p < pairs; ++p, x += batch, values += kVectors)
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(int(x[m])));
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
                part[m][v] = _mm512_dpbf16_ps(part[m][v], __m512bh(values[v]), pair);
        }
    for (int m = 0; m < kCount; ++m)
        for (int v = 0; v < kVectors; ++v) {
            float* sum = sums + m * kRows + 16 * v;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(part[m][v], scale[v], _mm512_loadu_ps(sum)));
        }
}

void multiply_rest(int64_t count, const __m512i* values, int pairs, const uint32_t* x, int64_t batch,
                   const __m512* scale, float* sums) {
    switch (count) {
        case 1:
            return multiply<1>(values, pairs, x, batch, scale, sums);
        case 2:
            return multiply<2>(values, pairs, x, batch, scale, sums);
        case 3:
            return multiply<3>(values, pairs, x, batch, scale, sums);
        case 4:
            return multiply<4>(values, pairs, x, batch, scale, sums);
        case 5:
            return multiply<5>(values, pairs, x, batch, scale, sums);
        case 6:
            return multiply<6>(values, pairs, x, batch, scale, sums);
        case 7:
            return multiply<7>(values, pairs, x, batch, scale, sums);
    }
}

// first is a multiple of kRows.
void run(const LinearArgs& args, int64_t first, int64_t last) {
    uint16_t rounded[32];
    for (int i = 0; i < 32; ++i) rounded[i] = from_float<BFloat16>(args.code[i % 16]).bits;
    const __m512i table = _mm512_loadu_si512(rounded);
    const int step = args.shift < 6 ? kHalfStep : kStep;
    const int64_t columns = args.columns, batch = args.batch;
    const int64_t capacity = (columns >> args.shift) + 2 + 16;
    std::vector<float> sums(size_t(batch * kRows)), scales(size_t(kRows * capacity));
    alignas(64) __m512i values[kStep / 2 * kVectors];
    for (int64_t n = first; n < last; n += kRows) {
        const uint8_t* packed[kRows];
        const float* row_scales[kRows];
        int64_t begin[kRows];
        for (int r = 0; r < kRows; ++r) {
            const int64_t row =
                n + r < args.rows ? n + r : args.rows - 1;  // the last one again, and not stored
            packed[r] = args.packed + row * columns / 2;
            begin[r] = row * columns;
            float* to = scales.data() + r * capacity;
            copy_scales(args, begin[r], begin[r] + columns, to);
            row_scales[r] = to - (begin[r] >> args.shift);
        }
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t k = 0; k < columns; k += step) {
            for (int v = 0; v < kVectors; ++v)
                for (int half = 0; half < step / kHalfStep; ++half)
                    decode(packed + 16 * v, k / 2 + half * 16, table, values + half * 16 * kVectors + v,
                           kVectors);
            alignas(64) float scale[kRows];
            for (int r = 0; r < kRows; ++r) scale[r] = row_scales[r][(begin[r] + k) >> args.shift];
            const __m512 factor[kVectors] = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)};
            const uint32_t* x = static_cast<const uint32_t*>(args.x) + k / 2 * batch;
            int64_t m = 0;
            for (; m + kTile <= batch; m += kTile)
                multiply<kTile>(values, step / 2, x + m, batch, factor, sums.data() + m * kRows);
            multiply_rest(batch - m, values, step / 2, x + m, batch, factor, sums.data() + m * kRows);
        }
        const int64_t rows = last - n < kRows ? last - n : kRows;
        for (int64_t m = 0; m < batch; ++m)
            for (int64_t r = 0; r < rows; ++r) store_result(args, m, n + r, sums[size_t(m * kRows + r)]);
    }
}

}  // namespace

LinearKernel avx512bf16_linear() { return {kRows, 32, kStep, arranged_bytes, arrange, run}; }

}  // namespace nf4
}  // namespace peftcore
