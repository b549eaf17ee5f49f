// y = c (keep ∘ x), the mask of dropout.h made row by row: one pass over memory.
#pragma once

#include "elementwise/cpu/kernels.h"
#include "simd/lanes.h"

namespace peftcore {
namespace elementwise {

using namespace simd;

template <typename Level>
struct DropRows {
    using T = typename Level::T;
    static constexpr int kLanes = Level::kLanes;
    static constexpr int64_t kPart = 4096;  // columns whose mask is made at a time

    static void rows(const DropArgs& args, int64_t first, int64_t last) {
        const typename Level::Vector factor = Level::set(args.factor);
        uint8_t bits[kPart / kColumnsPerCounter];
        static_assert(sizeof bits % kCounters == 0);
        for (; first < last; ++first) {
            const T* x = static_cast<const T*>(args.x) + first * args.columns;
            T* y = static_cast<T*>(args.y) + first * args.columns;
            for (int64_t begin = 0; begin < args.columns; begin += kPart) {
                const int64_t end = std::min(begin + kPart, args.columns);
                Level::keep_bytes(args.dropout, first, begin / kColumnsPerCounter,
                                  ceil_div(end - begin, kColumnsPerCounter), bits);
                for (int64_t n = begin; n < end; n += kLanes)
                    store_some<Level>(y + n, end - n,
                                      Level::keep(Level::mul(load_some<Level>(x + n, end - n), factor),
                                                  bits_at<Level>(bits, n - begin)));
            }
        }
    }
};

}  // namespace elementwise
}  // namespace peftcore
