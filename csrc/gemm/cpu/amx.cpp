// 32 rows of x by 32 columns of B in tile registers of 16 rows by 64 bytes, 16 pairs of inner numbers at a
// time: four tiles hold sums, two x, two B.
//
// A block of x passes by all tiles of a panel, which stays in the second cache; the next block is fetched
// ahead. Measured on two cores of Sapphire Rapids: 7.7 TFLOP/s with all in the first cache, 5.3 with all in
// the second, 1.9 with x in the third; so 1024 rows by 4096 x 4096 out of 4 bits reach 2.6, the library with
// a dense weight 2.4. No better: chunks of 512 or 2048 pairs, panels of 8 tiles; without fetching ahead 1.05
// of the time, with every block of x passing by one tile first 1.4.
#include "common/amx.h"

#include <cstring>

#include "gemm/cpu/avx512.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kRows = 2 * kSide;
constexpr int64_t kPairs = 1024;
constexpr int64_t kTiles = 4;
constexpr int64_t kPanelColumns = kTiles * kTileColumns;
constexpr int kAheadLines = kRows / kTiles;  // of the next block, at each step of a tile

int64_t filled_up(int64_t count) { return (count + kSide - 1) / kSide * kSide; }

// By chunks of kPairs pairs, by blocks of kRows rows (the last may have half), as [pairs / 16][rows][16].
void arrange(const Product& product, int64_t first, int64_t last, uint32_t* out) {
    const int64_t all = filled_up(product.pairs()), all_rows = filled_up(product.rows);
    for (int64_t chunk = 0; chunk < all; chunk += kPairs) {
        const int64_t pairs = least(kPairs, all - chunk);
        for (int64_t row = first; row < last; row += kRows) {
            const int64_t rows = least(kRows, filled_up(last - row));
            uint32_t* block = out + chunk * all_rows + row * pairs;
            for (int64_t m = 0; m < rows; ++m) {
                const BFloat16* x = product.x + (row + m) * product.inner;
                const bool there = row + m < last;
                for (int64_t p = 0; p < pairs; p += kSide) {
                    const int64_t k = 2 * (chunk + p), left = there ? product.inner - k : 0;
                    const __mmask32 mask = left < 32 ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
                    _mm512_store_si512(block + p * rows + m * kSide, _mm512_maskz_loadu_epi16(mask, x + k));
                }
            }
        }
    }
}

// `sums` has kRows rows, or half of them, of a tile's columns, `stride` bytes apart. `ahead`: what to fetch.
template <bool kBoth>
void multiply_tile(const uint32_t* x, const uint32_t* right, int64_t pairs, float* sums, int64_t stride,
                   bool first, const uint32_t* ahead) {
    float* below = sums + kSide * stride / 4;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, stride);
        _tile_loadd(1, sums + kSide, stride);
        if (kBoth) {
            _tile_loadd(2, below, stride);
            _tile_loadd(3, below + kSide, stride);
        }
    }
    for (int64_t p = 0; p < pairs; p += kSide, x += kBoth ? 2 * kTile : kTile, right += 2 * kTile) {
        for (int i = 0; i < kAheadLines; ++i, ahead += kSide)
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        _tile_loadd(6, right, 2 * kTileBytes);
        _tile_loadd(4, x, kTileBytes);
        _tile_loadd(7, right + kSide, 2 * kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (kBoth) _tile_loadd(5, x + kTile, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        if (kBoth) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + kSide, stride);
    if (kBoth) {
        _tile_stored(2, below, stride);
        _tile_stored(3, below + kSide, stride);
    }
}

void multiply_tiles(const Product& product, const uint32_t* x, int64_t first_tile, int64_t last_tile,
                    int64_t first_row, int64_t last_row, uint32_t* panel, float* sums) {
    alignas(64) float own[kRows * kTileColumns];  // sums of one chunk stay here
    const int64_t there = product.pairs(), all = filled_up(there), all_rows = filled_up(product.rows);
    const bool one_chunk = all <= kPairs;
    const int64_t width = one_chunk ? kTileColumns : kPanelColumns;
    _tile_loadconfig(&kTileShapes);
    for (int64_t tile = first_tile; tile < last_tile; tile += kTiles) {
        const int tiles = int(least(kTiles, last_tile - tile));
        for (int64_t chunk = 0; chunk < all; chunk += kPairs) {
            const int64_t pairs = least(kPairs, all - chunk), stride = pairs * kTileColumns;
            product.right.unpack(product.right.source, tile * kTileColumns, tiles, 2 * chunk,
                                 least(2 * (chunk + pairs), product.inner), stride, panel);
            if (const int64_t rest = chunk + pairs - there; rest > 0)
                for (int i = 0; i < tiles; ++i)
                    std::memset(panel + (i + 1) * stride - rest * kTileColumns, 0, 4 * rest * kTileColumns);
            memory_barrier_of_tiles();
            for (int64_t row = first_row; row < last_row; row += kRows) {
                const int64_t rows = least(kRows, last_row - row);
                const auto multiply = rows > kSide ? multiply_tile<true> : multiply_tile<false>;
                const uint32_t* block = x + chunk * all_rows + row * pairs;
                const uint32_t* next = block + filled_up(rows) * pairs;
                for (int i = 0; i < tiles; ++i) {
                    float* at = one_chunk ? own : sums + (row - first_row) * kPanelColumns + i * kTileColumns;
                    multiply(block, panel + i * stride, pairs, at, 4 * width, chunk == 0,
                             next + i * kAheadLines * pairs);
                    if (chunk + pairs < all) continue;
                    const int64_t column = (tile + i) * kTileColumns;
                    const Bias bias = bias_of(product, column);
                    for (int64_t m = 0; m < rows; ++m)
                        store_row(product, row + m, column, bias, _mm512_loadu_ps(at + m * width),
                                  _mm512_loadu_ps(at + m * width + kSide));
                }
            }
        }
    }
    _tile_release();
}

}  // namespace

Kernel amx_kernel() { return {kRows, kPairs, kTiles, kSide, kSide, arrange, multiply_tiles}; }

}  // namespace gemm
}  // namespace peftcore
