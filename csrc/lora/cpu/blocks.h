// The loops of kernels.h, the same for every dtype and level:
//
//   struct Level {
//     using T;                              what x, s and y hold
//     using Unit; static constexpr int kPair;
//     static constexpr int kLanes, kRows;   of a vector of fp32 sums; rows that share a right vector
//     using Vector; using Right;
//     static Vector zero(), set(float), load(const T*), load(const float*), add(Vector, Vector), mul(Vector,
//     Vector); static void store(T*, Vector), store(float*, Vector);
//     static Vector keep(Vector, uint32_t bits);                   zero where the bit is
//     static void keep_bytes(...);                                 see dropout.h
//     static Right load_right(const Unit*);
//     static Vector madd(Vector sum, const Unit* left, Right);     the left unit broadcast
//     static Unit unit(T even, T odd);                             odd: of pairs only
//     The `columns` values of x's row as units along it, up to a multiple of kLanes; those that `keep` drops
//     zero: static void stage_row(const T* row, int64_t columns, const uint8_t* keep, Unit* out); `count` <=
//     kPair rows as one row of units across them, up to a multiple of kLanes: static void stage_rows(const T*
//     row, int64_t stride, int64_t count, int64_t columns, const uint8_t* keep,
//                            int64_t keep_stride, Unit* out);
//     Optional: units of `count` outer numbers at `row`, followed by zeros, if it can:
//     static bool arrange_line(const T* row, int64_t inner_stride, int64_t outer_stride, int64_t count,
//                              bool pair, Unit* out);
//     Of AMX only, in place of `madd`: a whole block's products.
//     static constexpr bool kTiles = true;
//     sums [rows][width], of rows left [..][inner] that are left_row apart, and right [inner][width]:
//     static void down(const Unit* left, int64_t left_row, const Unit* right, int64_t width, int64_t rows,
//                      int64_t inner, float* sums);
//     sums [width][columns] += leftᵀ right, of left [inner][width], right [inner][columns]; width a multiple
//     of kWidthMultiple, columns of kLanes: static void outer(const Unit* left, int64_t width, const Unit*
//     right, int64_t columns, int64_t inner,
//                       float* sums);
//   };
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lora/cpu/dropout.h"
#include "lora/cpu/kernels.h"

namespace peftcore {
namespace lora {

template <typename Level, typename S>
static inline typename Level::Vector load_some(const S* from, int64_t count) {
    if (__builtin_expect(count >= Level::kLanes, true)) return Level::load(from);
    if (count <= 0) return Level::zero();
    S whole[Level::kLanes] = {};
    std::memcpy(whole, from, size_t(count) * sizeof(S));
    return Level::load(whole);
}

template <typename Level, typename S>
static inline void store_some(S* to, int64_t count, typename Level::Vector value) {
    if (__builtin_expect(count >= Level::kLanes, true)) return Level::store(to, value);
    if (count <= 0) return;
    S whole[Level::kLanes];
    Level::store(whole, value);
    std::memcpy(to, whole, size_t(count) * sizeof(S));
}

// The bits of kLanes columns from `column` on, which is a multiple of kLanes.
template <typename Level>
static inline uint32_t bits_at(const uint8_t* keep, int64_t column) {
    uint32_t bits = 0;
    std::memcpy(&bits, keep + column / 8, Level::kLanes >= 8 ? Level::kLanes / 8 : 1);
    return bits >> column % 8;
}

// Products of fp32, whatever x holds, on the vectors of `Simd`.
template <typename Simd, typename Type>
struct Single : Simd {
    using T = Type;
    using Unit = float;
    using Vector = typename Simd::Vector;
    using Right = Vector;
    static constexpr int kPair = 1;

    static inline Right load_right(const float* from) { return Simd::load(from); }
    static inline Vector madd(Vector sum, const float* left, Right right) {
        return Simd::fma(Simd::set(*left), right, sum);
    }
    static inline float unit(T value, T) { return to_float(value); }

    static inline bool arrange_line(const T* row, int64_t, int64_t outer_stride, int64_t count, bool,
                                    float* out) {
        if (outer_stride != 1) {
            if constexpr (std::is_same_v<T, float> && requires { Simd::gather; })
                return Simd::gather(row, outer_stride, count, out);
            return false;
        }
        for (int64_t j = 0; j < kWidthMultiple; j += Simd::kLanes)
            Simd::store(out + j, load_some<Single>(row + j, count - j));
        return true;
    }

    static inline void stage_row(const T* row, int64_t columns, const uint8_t* keep, float* out) {
        for (int64_t k = 0; k < columns; k += Simd::kLanes) {
            Vector value = load_some<Single>(row + k, columns - k);
            if (keep != nullptr) value = Simd::keep(value, bits_at<Single>(keep, k));
            Simd::store(out + k, value);
        }
    }
    static inline void stage_rows(const T* row, int64_t, int64_t, int64_t columns, const uint8_t* keep,
                                  int64_t, float* out) {
        stage_row(row, columns, keep, out);
    }
};

template <typename Level>
struct Blocks {
    using T = typename Level::T;
    using Unit = typename Level::Unit;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes, kRows = Level::kRows, kPair = Level::kPair;
    static constexpr bool kTiles = requires { Level::kTiles; };
    static constexpr int64_t kDownRows = kTiles ? 32 : kRows;  // that `down` stages together
    // A block of x that `outer` arranges: it stays in the second cache.
    static constexpr int64_t kBlockRows = 64, kBlockColumns = 256, kAhead = 8;

    static int64_t units(int64_t count) { return (count + kPair - 1) / kPair; }
    static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

    // sums[m][v] += the sum over i of left[m * left_row + i * left_inner] right[i * right_inner + v * kLanes
    // ..]
    template <int R, int V>
    static inline __attribute__((always_inline)) void multiply(const Unit* left, int64_t left_row,
                                                               int64_t left_inner, const Unit* right,
                                                               int64_t right_inner, int64_t inner,
                                                               Vector (&sums)[R][V]) {
        for (int64_t i = 0; i < inner; ++i, left += left_inner, right += right_inner) {
            typename Level::Right column[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) column[v] = Level::load_right(right + v * kLanes);
#pragma GCC unroll 16
            for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v)
                    sums[m][v] = Level::madd(sums[m][v], left + m * left_row, column[v]);
        }
    }

    // `tile` of all [rows, columns], as tile.run<R, V>(row, column); columns are padded.
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

    static void arrange(const void* source, int64_t inner_stride, int64_t outer_stride, int64_t inner,
                        int64_t outer, int64_t width, void* to) {
        const T* from = static_cast<const T*>(source);
        Unit* out = static_cast<Unit*>(to);
        // By 16 of the outer dimension, which are a cache line of the result.
        for (int64_t begin = 0; begin < width; begin += kWidthMultiple) {
            const int64_t count = std::clamp<int64_t>(outer - begin, 0, kWidthMultiple);
            for (int64_t i = 0; i < inner; i += kPair) {
                const T* row = from + i * inner_stride + begin * outer_stride;
                Unit* line = out + i / kPair * width + begin;
                const bool pair = i + 1 < inner;
                if constexpr (requires { Level::arrange_line; })
                    if (Level::arrange_line(row, inner_stride, outer_stride, count, pair, line)) continue;
                for (int64_t j = 0; j < count; ++j) {
                    const T* at = row + j * outer_stride;
                    line[j] = Level::unit(at[0], pair ? at[inner_stride] : T{});
                }
                for (int64_t j = count; j < kWidthMultiple; ++j) line[j] = Unit{};
            }
        }
    }

    struct DownTile {
        const DownArgs& args;
        const Unit* left;  // of row `first`
        int64_t left_row, first;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            Vector sums[R][V];
            for (auto& row : sums)
                for (Vector& sum : row) sum = Level::zero();
            multiply<R, V>(left + m * left_row, left_row, 1, static_cast<const Unit*>(args.right) + n,
                           args.width, units(args.columns), sums);
            const Vector factor = Level::set(args.factor);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const int64_t column = n + v * kLanes;
                    if (column < args.r)
                        store_some<Level>(static_cast<T*>(args.s) + (first + m + i) * args.r + column,
                                          args.r - column, Level::mul(sums[i][v], factor));
                }
        }
    };

    // Rows [first, last), whose units are at `left`.
    static void down_block(const DownArgs& args, const Unit* left, int64_t left_row, int64_t first,
                           int64_t last) {
        if constexpr (kTiles) {
            std::vector<float> sums(size_t(kDownRows * args.width));
            const Vector factor = Level::set(args.factor);
            for (int64_t m = first; m < last; m += kDownRows, left += kDownRows * left_row) {
                const int64_t rows = std::min(kDownRows, last - m);
                Level::down(left, left_row, static_cast<const Unit*>(args.right), args.width, rows,
                            units(args.columns), sums.data());
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t column = 0; column < args.r; column += kLanes)
                        store_some<Level>(
                            static_cast<T*>(args.s) + (m + i) * args.r + column, args.r - column,
                            Level::mul(Level::load(&sums[size_t(i * args.width + column)]), factor));
            }
        } else {
            tiles(last - first, padded(args.r), DownTile{args, left, left_row, first});
        }
    }

    static void down(const DownArgs& args, int64_t first, int64_t last) {
        const T* x = static_cast<const T*>(args.x);
        const int64_t columns = args.columns, inner = units(columns);
        if (args.keep.bits == nullptr && sizeof(T) * kPair == sizeof(Unit) && columns % kPair == 0) {
            const Unit* left = reinterpret_cast<const Unit*>(x + first * columns);
            return down_block(args, left, inner, first, last);
        }
        const int64_t stride = padded(inner);
        std::vector<Unit> rows(size_t(kDownRows * stride));
        for (int64_t m = first; m < last; m += kDownRows) {
            const int64_t count = std::min<int64_t>(kDownRows, last - m);
            for (int64_t i = 0; i < count; ++i)
                Level::stage_row(x + (m + i) * columns, columns, args.keep.row(m + i),
                                 rows.data() + i * stride);
            down_block(args, rows.data(), stride, m, m + count);
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
            const bool masks = args.keep.bits != nullptr;
            // y comes from the third cache or from memory: the next tile's, while this one is multiplied.
            if (count > 2 * kLanes)
                for (int i = 0; i < R; ++i)
                    __builtin_prefetch(reinterpret_cast<const char*>(y + i * args.columns + 2 * kLanes), 1);
            Vector sums[R][V];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v)
                    sums[i][v] =
                        masks ? Level::zero()
                              : load_some<Level>(y + i * args.columns + v * kLanes, count - v * kLanes);
            multiply<R, V>(static_cast<const Unit*>(args.left) + row * args.left_row, args.left_row,
                           args.left_inner, static_cast<const Unit*>(args.right) + n, args.width, args.inner,
                           sums);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    T* to = y + i * args.columns + v * kLanes;
                    const int64_t left = count - v * kLanes;
                    Vector sum = sums[i][v];
                    if (masks) {
                        const uint32_t bits = bits_at<Level>(args.keep.row(row + i), n + v * kLanes);
                        sum = Level::add(load_some<Level>(to, left), Level::keep(sum, bits));
                    }
                    store_some<Level>(to, left, sum);
                }
        }
    };

    static void up(const UpArgs& args, int64_t first, int64_t last) {
        tiles(last - first, padded(args.columns), UpTile{args, first});
    }

    struct OuterTile {
        const Unit *left, *right;
        int64_t left_inner, right_inner, inner;
        float* sums;
        int64_t sums_row;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            Vector tile[R][V];
            float* to = sums + m * sums_row + n;
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) tile[i][v] = Level::load(to + i * sums_row + v * kLanes);
            multiply<R, V>(left + m, 1, left_inner, right + n, right_inner, inner, tile);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) Level::store(to + i * sums_row + v * kLanes, tile[i][v]);
        }
    };

    // Rows of x some way ahead: they lie too far apart for the processor to foresee.
    static inline void prefetch(const T* x, int64_t stride, int64_t rows, int64_t columns) {
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t k = 0; k < columns; k += 64 / int64_t(sizeof(T)))
                __builtin_prefetch(reinterpret_cast<const char*>(x + m * stride + k));
    }

    static void outer(const OuterArgs& args, int64_t first, int64_t last) {
        alignas(64) Unit block[(kBlockRows + kPair - 1) / kPair * kBlockColumns];
        const int64_t sums_row =
            (args.last_column - args.first_column + kColumnGrain - 1) / kColumnGrain * kColumnGrain;
        for (int64_t m = first; m < last; m += kBlockRows)
            for (int64_t begin = args.first_column; begin < args.last_column; begin += kBlockColumns) {
                const int64_t rows = std::min(kBlockRows, last - m);
                const int64_t columns = std::min(kBlockColumns, args.last_column - begin);
                const T* x = static_cast<const T*>(args.x) + m * args.columns + begin;
                const Unit* left = static_cast<const Unit*>(args.left) + m / kPair * args.width;
                float* sums = args.sums + begin - args.first_column;
                if constexpr (std::is_same_v<T, Unit>)
                    // x is units already; but from memory it comes faster row by row, as below.
                    if (args.cached && args.keep.bits == nullptr && columns % kLanes == 0) {
                        tiles(args.r, columns,
                              OuterTile{left, x, args.width, args.columns, rows, sums, sums_row});
                        continue;
                    }
                const int64_t width = padded(columns);
                for (int64_t i = 0; i < rows; i += kPair) {
                    prefetch(x + (i + kAhead) * args.columns, args.columns,
                             std::min<int64_t>(kPair, rows - i - kAhead), columns);
                    const uint8_t* keep = args.keep.row(m + i);
                    Level::stage_rows(x + i * args.columns, args.columns, std::min<int64_t>(kPair, rows - i),
                                      columns, keep == nullptr ? nullptr : keep + begin / 8, args.keep.stride,
                                      block + i / kPair * width);
                }
                if constexpr (kTiles) {
                    constexpr int64_t kTogether = 16;  // units that they take
                    const int64_t filled = (units(rows) + kTogether - 1) / kTogether * kTogether;
                    std::fill(block + units(rows) * width, block + filled * width, Unit{});
                    Level::outer(left, args.width, block, width, units(rows), sums, sums_row);
                } else {
                    tiles(args.r, width,
                          OuterTile{left, block, args.width, width, units(rows), sums, sums_row});
                }
            }
    }

    static Kernels kernels() {
        return {kPair, int(sizeof(Unit)), arrange, Level::keep_bytes, down, up, outer};
    }
};

}  // namespace lora
}  // namespace peftcore
