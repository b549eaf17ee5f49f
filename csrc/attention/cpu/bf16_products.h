// Matrix products with bf16 dot products, and the layout of their factors.
//
// A word is a pair of values along the inner dimension. Left factors have word p of row r at p * stride + r. Right factors
// are tiles of 32 columns, with word p of column c at p * 32 + c.
#pragma once

#include <algorithm>

#include "common/integers.h"
#include "gemm/cpu/transpose.h"
#include "simd/avx512.h"

namespace peftcore {
namespace attention {

using namespace simd;
namespace {

constexpr int64_t kTileRows = 12, kTile = 32;

// c [12, 32] = a b, or c += a b with `kAdd`.
template <bool kAdd>
inline void multiply(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t pairs, float* c,
                     int64_t c_stride) {
    __m512 sum[kTileRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            sum[r][v] = kAdd ? _mm512_loadu_ps(c + r * c_stride + 16 * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p, a += stride, b += kTile) {
        const __m512bh first = __m512bh(_mm512_loadu_si512(b)), second = __m512bh(_mm512_loadu_si512(b + 16));
#pragma GCC unroll 12
        for (int r = 0; r < kTileRows; ++r) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(int(a[r])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, pair);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * c_stride + 16 * v, sum[r][v]);
}

// Words of at most 16 rows, the missing ones zero, as columns; `words` is a multiple of 16. Up to 16 words are written
// at each multiple of out_stride, in order.
void turn(const BFloat16* from, int64_t stride, int64_t rows, int64_t words, uint32_t* out,
          int64_t out_stride) {
    for (int64_t w = 0; w < words; w += 16) {
        __m512i row[16];
#pragma GCC unroll 16
        for (int64_t r = 0; r < 16; ++r)
            row[r] = r < rows ? _mm512_loadu_si512(from + r * stride + 2 * w) : _mm512_setzero_si512();
        gemm::transpose_words(row);
#pragma GCC unroll 16
        for (int64_t p = 0; p < 16; ++p) _mm512_storeu_si512(out + (w + p) * out_stride, row[p]);
    }
}

// A left factor of at most 48 rows; blocks of 12 are `words * 12` words apart, and 4 words behind them are written.
void left_of(const BFloat16* from, int64_t stride, int64_t rows, int64_t words, uint32_t* out) {
    for (int64_t r = 0; r < rows; r += kTileRows, out += words * kTileRows)
        turn(from + r * stride, stride, std::min(kTileRows, rows - r), words, out, kTileRows);
}

// The transpose of `rows` rows as right factor, missing columns zero; tiles are `words * 32` words apart.
void right_transposed(const BFloat16* from, int64_t stride, int64_t rows, int64_t words, uint32_t* out) {
    for (int64_t r = 0; r < filled_up(rows, kTile); r += 16)
        turn(from + r * stride, stride, std::clamp<int64_t>(rows - r, 0, 16), words,
             out + r / kTile * words * kTile + r % kTile, kTile);
}

// Two rows of 32 values as 32 pairs.
inline void interleave(__m512i above, __m512i below, uint32_t* out) {
    alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(above, low, below));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(above, high, below));
}

// `rows` rows as right factor, of `pairs` words: missing rows are zero. Tiles are `pairs * 32` words apart.
void right_of(const BFloat16* from, int64_t stride, int64_t rows, int64_t size, int64_t pairs,
              uint32_t* out) {
    for (int64_t p = 0; p < pairs; ++p)
        for (int64_t i = 0; i < size; i += kTile) {
            const BFloat16* above = from + 2 * p * stride + i;
            interleave(2 * p < rows ? _mm512_loadu_si512(above) : _mm512_setzero_si512(),
                       2 * p + 1 < rows ? _mm512_loadu_si512(above + stride) : _mm512_setzero_si512(),
                       out + i * pairs + p * kTile);
        }
}

// The transpose of P or dS, [rows, columns], as left factor: one row of words for each pair of rows, followed by zeros.
void left_transposed(const BFloat16* from, int64_t stride, int64_t pairs, int64_t columns, uint32_t* out,
                     int64_t out_stride) {
    for (int64_t p = 0; p < pairs; ++p, out += out_stride) {
        const BFloat16* above = from + 2 * p * stride;
        for (int64_t k = 0; k < columns; k += kTile)
            interleave(_mm512_loadu_si512(above + k), _mm512_loadu_si512(above + stride + k), out + k);
        _mm512_storeu_si512(out + columns, _mm512_setzero_si512());
    }
}

// c [rows, columns] = a b, of whole tiles.
template <bool kAdd>
void product(const uint32_t* a, int64_t block_stride, int64_t stride, int64_t rows, const uint32_t* b,
             int64_t tile_stride, int64_t columns, int64_t pairs, float* c, int64_t c_stride) {
    for (int64_t n = 0; n < columns; n += kTile, b += tile_stride)
        for (int64_t r = 0; r < rows; r += kTileRows)
            multiply<kAdd>(a + r / kTileRows * block_stride, stride, b, pairs, c + r * c_stride + n,
                           c_stride);
}

void store_rows(const float* from, int64_t stride, int64_t rows, int64_t size, const float* factors,
                BFloat16* to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(factors == nullptr ? 1.0f : factors[r]);
        for (int64_t i = 0; i < size; i += kTile) {
            const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(from + r * stride + i), factor),
                         second = _mm512_mul_ps(_mm512_loadu_ps(from + r * stride + i + 16), factor);
            _mm512_storeu_si512(to + r * to_stride + i, __m512i(_mm512_cvtne2ps_pbh(second, first)));
        }
    }
}

}  // namespace
}  // namespace attention
}  // namespace peftcore
