// Norms of the rows of x + left right, one tile at a time in registers; products and sums are fp32.
#pragma once

#include <cmath>

#include "norms/cpu/kernels.h"
#include "simd/products.h"

namespace peftcore {
namespace norms {

using namespace simd;

template <typename Level>
struct RowNorms {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes, kRows = Level::kRows;
    static constexpr int64_t kChain = 64 * kLanes;  // columns of a short sum (see blocks.h)
    static_assert(kRows <= kLanes);

    // Adds the squares of R rows and V vectors of columns.
    template <int R, int V>
    static inline void add_squares(const RowNormsArgs& args, int64_t row, int64_t n, Vector (&squares)[R]) {
        const T* x = static_cast<const T*>(args.x) + row * args.columns + n;
        const int64_t count = args.columns - n;
        // Prefetches x of the next tile from L3 or memory during this one.
        if (count > 2 * kLanes)
            for (int i = 0; i < R; ++i)
                __builtin_prefetch(reinterpret_cast<const char*>(x + i * args.columns + 2 * kLanes));
        Vector sums[R][V];
        Products<Level>::template multiply<R, V>(args.left + row * args.inner, args.inner, 1, args.right + n,
                                                 args.width, args.inner, sums);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                const Vector of_x = load_some<Level>(x + i * args.columns + v * kLanes, count - v * kLanes);
                const Vector sum = Level::add(of_x, sums[i][v]);
                squares[i] = Level::fma(sum, sum, squares[i]);
            }
    }

    template <int R>
    static void rows(const RowNormsArgs& args, int64_t row) {
        Vector total[kLanes];
        for (int i = 0; i < kLanes; ++i) total[i] = Level::zero();
        for (int64_t n = 0; n < args.columns;) {
            const int64_t end = std::min(n + kChain, args.columns);
            Vector squares[R];
            for (int i = 0; i < R; ++i) squares[i] = Level::zero();
            for (; n + kLanes < end; n += 2 * kLanes) add_squares<R, 2>(args, row, n, squares);
            if (n < end) add_squares<R, 1>(args, row, n, squares);
            n = end;
            for (int i = 0; i < R; ++i) total[i] = Level::add(total[i], squares[i]);
        }
        float sums[kLanes];
        Level::store(sums, Level::sums(total));
        for (int i = 0; i < R; ++i) args.norms[row + i] = std::sqrt(sums[i]);
    }

    static void norms(const RowNormsArgs& args, int64_t first, int64_t last) {
        for (; first + kRows <= last; first += kRows) rows<kRows>(args, first);
        for (; first + 4 <= last; first += 4) rows<4>(args, first);
        for (; first < last; ++first) rows<1>(args, first);
    }
};

}  // namespace norms
}  // namespace peftcore
