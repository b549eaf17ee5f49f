// 12 rows of x by 32 columns of B in registers, a pair of inner numbers at a time: 24 of 32 registers hold
// sums.
//
// Measured on one core of Zen 4: 230 to 236 GFLOP/s with all in the second cache, of 237 that the dot
// products allow; 220 with 1020 rows by 4096 x 4096 out of 4 bits, where the library reaches 205 to 218 with
// a dense weight. No better: chunks of 384 or 512 pairs, panels of 8 tiles.
#include "gemm/cpu/avx512.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kRows = 12;     // of x that a register tile multiplies
constexpr int64_t kPairs = 1024;  // of a chunk: with it a panel is half of a second cache of 1 MiB
constexpr int64_t kTiles = 4;     // of a panel
constexpr int64_t kPanelColumns = kTiles * kTileColumns;

// out[pair][row] of R rows of x [.., inner], from their inner number `first` to `last`.
void arrange_block(const BFloat16* x, int64_t inner, int64_t rows, int64_t first, int64_t last,
                   uint32_t* out) {
    alignas(64) uint32_t block[kRows][16];
    for (int64_t k = first; k < last; k += 32, out += 16 * rows) {
        const __mmask32 there = last - k < 32 ? (__mmask32(1) << (last - k)) - 1 : ~__mmask32(0);
        for (int64_t m = 0; m < rows; ++m)
            _mm512_store_si512(block[m], _mm512_maskz_loadu_epi16(there, x + m * inner + k));
        const int64_t pairs = least(16, (last - k + 1) / 2);
        for (int64_t p = 0; p < pairs; ++p)
            for (int64_t m = 0; m < rows; ++m) out[p * rows + m] = block[m][p];
    }
}

struct Place {
    const Product& product;
    int64_t row, column;
    float* sums;  // of this row and column, kPanelColumns a row
    bool first, last;
};

template <int R>
inline void multiply_tile(const Place& place, const uint32_t* x, const uint32_t* right, int64_t pairs) {
    __m512 sum[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            sum[r][v] =
                place.first ? _mm512_setzero_ps() : _mm512_loadu_ps(place.sums + r * kPanelColumns + 16 * v);
    for (int64_t p = 0; p < pairs; ++p, x += R, right += kTileColumns) {
        const __m512bh first = __m512bh(_mm512_loadu_si512(right)),
                       second = __m512bh(_mm512_loadu_si512(right + 16));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(int(x[r])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, pair);
        }
    }
    if (!place.last) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) _mm512_storeu_ps(place.sums + r * kPanelColumns + 16 * v, sum[r][v]);
        return;
    }
    const Bias bias = bias_of(place.product, place.column);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        store_row(place.product, place.row + r, place.column, bias, sum[r][0], sum[r][1]);
}

using Tile = void (*)(const Place&, const uint32_t*, const uint32_t*, int64_t);
constexpr Tile kTileOf[kRows + 1] = {nullptr,          multiply_tile<1>, multiply_tile<2>,  multiply_tile<3>,
                                     multiply_tile<4>, multiply_tile<5>, multiply_tile<6>,  multiply_tile<7>,
                                     multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>,
                                     multiply_tile<12>};

bool in_place(const Product&) { return false; }

// By chunks of kPairs pairs, by blocks of kRows rows (the last may have fewer), as [pairs][rows].
void arrange(const Product& product, int64_t first, int64_t last, uint32_t* out) {
    const int64_t all = product.pairs();
    for (int64_t chunk = 0; chunk < all; chunk += kPairs) {
        const int64_t pairs = least(kPairs, all - chunk);
        for (int64_t row = first; row < last; row += kRows) {
            const int64_t rows = least(kRows, last - row);
            arrange_block(product.x + row * product.inner, product.inner, rows, 2 * chunk,
                          least(2 * (chunk + pairs), product.inner),
                          out + chunk * product.rows + row * pairs);
        }
    }
}

void multiply_tiles(const Product& product, const uint32_t* x, const uint32_t*, int64_t first_tile,
                    int64_t last_tile, int64_t first_row, int64_t last_row, const Buffers& buffers) {
    uint32_t* panel = buffers.panel;
    const int64_t all = product.pairs();
    for (int64_t tile = first_tile; tile < last_tile; tile += kTiles) {
        const int tiles = int(least(kTiles, last_tile - tile));
        for (int64_t chunk = 0; chunk < all; chunk += kPairs) {
            const int64_t pairs = least(kPairs, all - chunk), stride = pairs * kTileColumns;
            product.right.unpack(product.right.source, tile * kTileColumns, tiles, 2 * chunk,
                                 least(2 * (chunk + pairs), product.inner), stride, panel);
            for (int64_t row = first_row; row < last_row; row += kRows) {
                const int64_t rows = least(kRows, last_row - row);
                const uint32_t* block = x + chunk * product.rows + row * pairs;
                for (int i = 0; i < tiles; ++i) {
                    const Place place{product,
                                      row,
                                      (tile + i) * kTileColumns,
                                      buffers.sums + (row - first_row) * kPanelColumns + i * kTileColumns,
                                      chunk == 0,
                                      chunk + pairs == all};
                    kTileOf[rows](place, block, panel + i * stride, pairs);
                }
            }
        }
    }
}

}  // namespace

Kernel avx512bf16_kernel() { return {kRows, kPairs, kTiles, 1, 1, false, in_place, arrange, multiply_tiles}; }

}  // namespace gemm
}  // namespace peftcore
