// Products of fp32 matrices in register tiles: values of R rows of the left factor are broadcast and multiplied by V
// vectors of the right factor.
#pragma once

#include "simd/lanes.h"

namespace peftcore {
namespace simd {

template <typename Level>
struct Products {
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes, kRows = Level::kRows;

    static int64_t padded(int64_t count) { return filled_up(count, kLanes); }

    // The sum over i of left row m and right columns v * kLanes ..:
    //   sums[m][v] = left[m * left_row + i * left_inner] right[i * right_inner + v * kLanes ..]
    template <int R, int V>
    static inline __attribute__((always_inline)) void multiply(const float* left, int64_t left_row,
                                                               int64_t left_inner, const float* right,
                                                               int64_t right_inner, int64_t inner,
                                                               Vector (&sums)[R][V]) {
#pragma GCC unroll 16
        for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[m][v] = Level::zero();
        for (int64_t i = 0; i < inner; ++i, left += left_inner, right += right_inner) {
            Vector column[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) column[v] = Level::load(right + v * kLanes);
#pragma GCC unroll 16
            for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v)
                    sums[m][v] = Level::fma(Level::set(left[m * left_row]), column[v], sums[m][v]);
        }
    }

    // Calls tile.run<R, V>(row, column) for all tiles of [rows, columns]; columns are padded to whole vectors.
    template <int R, typename Tile>
    static inline void row_tiles(int64_t row, int64_t columns, const Tile& tile) {
        int64_t n = 0;
        for (; n + 2 * kLanes <= columns; n += 2 * kLanes) tile.template run<R, 2>(row, n);
        if (n < columns) tile.template run<R, 1>(row, n);
    }

    template <typename Tile>
    static void tiles(int64_t rows, int64_t columns, const Tile& tile) {
        int64_t m = 0;
        for (; m + kRows <= rows; m += kRows) row_tiles<kRows>(m, columns, tile);
        for (; m + 4 <= rows; m += 4) row_tiles<4>(m, columns, tile);
        for (; m < rows; ++m) row_tiles<1>(m, columns, tile);
    }
};

}  // namespace simd
}  // namespace peftcore
