// The low-rank products of kernels.h in fp32, shared by all dtypes of x and all levels.
//
// A long sum is a sum of short ones, of kChain products each, to reduce the rounding error, which grows with the root
// of a sum's length.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/caches.h"
#include "lora/cpu/kernels.h"
#include "simd/products.h"

namespace peftcore {
namespace lora {

using namespace simd;

// Prefetches a later row of x: rows are too far apart for the processor's prefetcher.
template <typename T>
static inline void prefetch(const T* row, int64_t columns) {
    for (int64_t k = 0; k < columns; k += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(reinterpret_cast<const char*>(row + k));
}

// A block of x that `outer` arranges; it stays in the L2 cache.
constexpr int64_t kBlockRows = 64, kBlockColumns = 256;
static_assert(kBlockRows <= kRowGrain && kBlockRows * kBlockColumns * sizeof(float) <= kSmallestSecond / 2);

template <typename T>
struct OuterBlock {
    int64_t row, rows, columns;
    const T* x;   // its first value
    Mask keep;    // of this block's rows and columns
    float* sums;  // of its columns, sums_row a row
    int64_t sums_row;
};

// Prefetches later rows when row i is read.
template <typename T>
static inline void prefetch_ahead(const OuterBlock<T>& block, int64_t i, int64_t x_row) {
    constexpr int64_t kAhead = 8;
    if (i + kAhead < block.rows) prefetch(block.x + (i + kAhead) * x_row, block.columns);
}

template <typename T, typename Body>
static inline void for_each_block(const OuterArgs& args, int64_t first, int64_t last, const Body& body) {
    const int64_t sums_row = filled_up(args.last_column - args.first_column, kColumnGrain);
    for (int64_t row = first; row < last; row += kBlockRows)
        for (int64_t column = args.first_column; column < args.last_column; column += kBlockColumns) {
            Mask keep = args.keep;
            if (keep.bits != nullptr) keep.bits += row * keep.stride + column / 8;
            body(OuterBlock<T>{.row = row,
                               .rows = least(kBlockRows, last - row),
                               .columns = least(kBlockColumns, args.last_column - column),
                               .x = static_cast<const T*>(args.x) + row * args.columns + column,
                               .keep = keep,
                               .sums = args.sums + column - args.first_column,
                               .sums_row = sums_row});
        }
}

template <typename Level>
struct Blocks {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes, kRows = Level::kRows;
    using Products = simd::Products<Level>;
    static constexpr int64_t kChain = 64;
    static_assert(kBlockRows == kChain);

    static void arrange(const float* from, int64_t inner_stride, int64_t outer_stride, int64_t inner,
                        int64_t outer, int64_t width, void* to) {
        float* out = static_cast<float*>(to);
        // By 16 of the outer dimension, which are a cache line of the result.
        for (int64_t begin = 0; begin < width; begin += kWidthMultiple) {
            const int64_t count = std::clamp<int64_t>(outer - begin, 0, kWidthMultiple);
            for (int64_t i = 0; i < inner; ++i) {
                const float* row = from + i * inner_stride + begin * outer_stride;
                float* line = out + i * width + begin;
                if constexpr (Gathers<Level>)
                    if (Level::gather(row, outer_stride, count, line)) continue;
                for (int64_t j = 0; j < count; ++j) line[j] = row[j * outer_stride];
                for (int64_t j = count; j < kWidthMultiple; ++j) line[j] = 0;
            }
        }
    }

    struct DownTile {
        const DownArgs& args;
        const float* left;  // of row `first`
        int64_t left_row, first;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            const float* x = left + m * left_row;
            const float* right = static_cast<const float*>(args.right) + n;
            // The rows of the next tile, a chain at a time: `down` takes 0.45 of the time with AVX2 on Zen 5 (788 rows of
            // 3072 values, r = 16), and as long as before with AVX-512.
            const auto prefetch_next = [&](int64_t column) {
                if (n != 0) return;
                const float* next = x + R * left_row + column;
                for (int i = 0; i < R; ++i, next += left_row)
                    for (int64_t k = 0; k < kChain; k += 16)
                        __builtin_prefetch(reinterpret_cast<const char*>(next + k), 0, 2);
            };
            prefetch_next(0);
            Vector total[R][V];
            Products::template multiply<R, V>(x, left_row, 1, right, args.width,
                                              std::min(kChain, args.columns), total);
            for (int64_t k = kChain; k < args.columns; k += kChain) {
                Vector sums[R][V];
                prefetch_next(k);
                Products::template multiply<R, V>(x + k, left_row, 1, right + k * args.width, args.width,
                                                  std::min(kChain, args.columns - k), sums);
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) total[i][v] = Level::add(total[i][v], sums[i][v]);
            }
            const Vector factor = Level::set(args.factor);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const int64_t column = n + v * kLanes;
                    if (column < args.r)
                        store_some<Level>(args.s + (first + m + i) * args.r + column, args.r - column,
                                          Level::mul(total[i][v], factor));
                }
        }
    };

    static void down(const DownArgs& args, int64_t first, int64_t last) {
        const T* x = static_cast<const T*>(args.x);
        const int64_t columns = args.columns;
        if constexpr (std::is_same_v<T, float>)
            if (args.keep.bits == nullptr)
                return Products::tiles(last - first, Products::padded(args.r),
                                       DownTile{args, x + first * columns, columns, first});
        const int64_t stride = Products::padded(columns);
        std::vector<float> rows(size_t(kRows * stride));
        for (int64_t m = first; m < last; m += kRows) {
            const int64_t count = std::min<int64_t>(kRows, last - m);
            for (int64_t i = 0; i < count; ++i)
                stage_row<Level>(x + (m + i) * columns, columns, args.keep.row(m + i),
                                 rows.data() + i * stride);
            Products::tiles(count, Products::padded(args.r), DownTile{args, rows.data(), stride, m});
        }
    }

    struct UpTile {
        const UpArgs& args;
        int64_t first;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            const int64_t row = first + m;
            T* y = static_cast<T*>(args.y) + row * args.columns + n;
            const int64_t count = args.columns - n;
            // Prefetches y of the next tile from L3 or memory while this one is multiplied.
            if (count > 2 * kLanes)
                for (int i = 0; i < R; ++i)
                    __builtin_prefetch(reinterpret_cast<const char*>(y + i * args.columns + 2 * kLanes), 1);
            Vector sums[R][V];
            Products::template multiply<R, V>(args.left + row * args.inner, args.inner, 1, args.right + n,
                                              args.width, args.inner, sums);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    T* to = y + i * args.columns + v * kLanes;
                    const int64_t left = count - v * kLanes;
                    Vector sum = sums[i][v];
                    if (args.keep.bits != nullptr)
                        sum = Level::keep(sum, bits_at<Level>(args.keep.row(row + i), n + v * kLanes));
                    store_some<Level>(to, left, Level::add(load_some<Level>(to, left), sum));
                }
        }
    };

    static void up(const UpArgs& args, int64_t first, int64_t last) {
        Products::tiles(last - first, Products::padded(args.columns), UpTile{args, first});
    }

    struct OuterTile {
        const float *left, *right;
        int64_t left_inner, right_inner, inner;
        float* sums;
        int64_t sums_row;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            Vector tile[R][V];
            float* to = sums + m * sums_row + n;
            Products::template multiply<R, V>(left + m, 1, left_inner, right + n, right_inner, inner, tile);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    float* at = to + i * sums_row + v * kLanes;
                    Level::store(at, Level::add(Level::load(at), tile[i][v]));
                }
        }
    };

    static void outer(const OuterArgs& args, int64_t first, int64_t last) {
        alignas(64) float staged[kBlockRows * kBlockColumns];
        for_each_block<T>(args, first, last, [&](const OuterBlock<T>& block) {
            const float* left = static_cast<const float*>(args.left) + block.row * args.width;
            if constexpr (std::is_same_v<T, float>)
                // x could be read in place, but from memory reading it row by row, as below, is faster.
                if (args.cached && block.keep.bits == nullptr && block.columns % kLanes == 0)
                    return Products::tiles(args.r, block.columns,
                                           OuterTile{.left = left,
                                                     .right = block.x,
                                                     .left_inner = args.width,
                                                     .right_inner = args.columns,
                                                     .inner = block.rows,
                                                     .sums = block.sums,
                                                     .sums_row = block.sums_row});
            const int64_t width = Products::padded(block.columns);
            for (int64_t i = 0; i < block.rows; ++i) {
                prefetch_ahead(block, i, args.columns);
                stage_row<Level>(block.x + i * args.columns, block.columns, block.keep.row(i),
                                 staged + i * width);
            }
            Products::tiles(args.r, width,
                            OuterTile{.left = left,
                                      .right = staged,
                                      .left_inner = args.width,
                                      .right_inner = width,
                                      .inner = block.rows,
                                      .sums = block.sums,
                                      .sums_row = block.sums_row});
        });
    }

    static ThinKernels kernels() {
        const Arrangement plain{.pair = 1, .unit_size = int(sizeof(float)), .arrange = arrange};
        return {.arrangement = plain,
                .plain = plain,
                .keep_bytes = Level::keep_bytes,
                .down = down,
                .up = up,
                .outer = outer};
    }
};

}  // namespace lora
}  // namespace peftcore
