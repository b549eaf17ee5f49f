// y = x ∘ g, with g one number per column, and its gradients: one pass over memory each, products and sums in fp32.
#pragma once

#include "elementwise/cpu/kernels.h"
#include "simd/lanes.h"

namespace peftcore {
namespace elementwise {

using namespace simd;

template <typename Level>
struct Scaled {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes;

    static void scale(const ScaleArgs& args, int64_t first, int64_t last) {
        for (; first < last; ++first) {
            const T* x = static_cast<const T*>(args.x) + first * args.columns;
            T* y = static_cast<T*>(args.y) + first * args.columns;
            for (int64_t n = 0; n < args.columns; n += kLanes) {
                const int64_t left = args.columns - n;
                store_some<Level>(
                    y + n, left,
                    Level::mul(load_some<Level>(x + n, left), load_some<Level>(args.g + n, left)));
            }
        }
    }

    // For the columns from args.first_column to args.last_column.
    static void backward(const ScaleBackwardArgs& args, int64_t first, int64_t last) {
        for (; first < last; ++first) {
            const int64_t row = first * args.columns;
            const T *dy = static_cast<const T*>(args.dy) + row, *x = static_cast<const T*>(args.x) + row;
            T* dx = args.dx == nullptr ? nullptr : static_cast<T*>(args.dx) + row;
            for (int64_t n = args.first_column; n < args.last_column; n += kLanes) {
                const int64_t left = args.last_column - n;
                const Vector gradient = load_some<Level>(dy + n, left);
                if (dx != nullptr)
                    store_some<Level>(dx + n, left, Level::mul(gradient, load_some<Level>(args.g + n, left)));
                if (args.sums != nullptr)
                    Level::store(args.sums + n, Level::fma(gradient, load_some<Level>(x + n, left),
                                                           Level::load(args.sums + n)));
            }
        }
    }

    static ScaleKernels kernels() { return {.scale = scale, .backward = backward}; }
};

}  // namespace elementwise
}  // namespace peftcore
