// Weighted sums of rows, and the gradients of such a sum; products and sums are fp32.
#pragma once

#include "grouped/cpu/kernels.h"
#include "simd/lanes.h"

namespace peftcore {
namespace grouped {

using namespace simd;

template <typename Level>
struct SumsOfRows {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes;

    template <typename Sum>
    static void sum_of(const RowSumArgs& args, int64_t token) {
        const int64_t* places = args.places + token * args.k;
        const float* weights = args.weights == nullptr ? nullptr : args.weights + token * args.k;
        Sum* out = static_cast<Sum*>(args.out) + token * args.columns;
        for (int64_t n = 0; n < args.columns; n += kLanes) {
            const int64_t left = args.columns - n;
            Vector sum = Level::zero();
            for (int64_t j = 0; j < args.k; ++j) {
                const Vector value =
                    load_some<Level>(static_cast<const T*>(args.y) + places[j] * args.columns + n, left);
                sum = weights == nullptr ? Level::add(sum, value)
                                         : Level::fma(Level::set(weights[j]), value, sum);
            }
            store_some<Level>(out + n, left, sum);
        }
    }

    static void sums(const RowSumArgs& args, int64_t first, int64_t last) {
        for (; first < last; ++first) args.wide ? sum_of<float>(args, first) : sum_of<T>(args, first);
    }

    // For row i of pair p = order[i], which is token p / k's:
    //   dy_i = w_p grad        dw_p = grad · y_i
    template <typename Sum>
    static void gradient_of(const RowSumBackwardArgs& args, int64_t row) {
        const int64_t pair = args.order[row], columns = args.columns;
        const Sum* grad = static_cast<const Sum*>(args.grad) + pair / args.k * columns;
        const T* y = args.y == nullptr ? nullptr : static_cast<const T*>(args.y) + row * columns;
        Sum* dy = args.dy == nullptr ? nullptr : static_cast<Sum*>(args.dy) + row * columns;
        const Vector weight = Level::set(args.weights[pair]);
        Vector sums[kLanes];
        for (Vector& sum : sums) sum = Level::zero();
        for (int64_t n = 0; n < columns; n += kLanes) {
            const Vector its = load_some<Level>(grad + n, columns - n);
            if (dy != nullptr) store_some<Level>(dy + n, columns - n, Level::mul(weight, its));
            if (y != nullptr) {
                Vector& sum = sums[n / kLanes % 4];
                sum = Level::fma(its, load_some<Level>(y + n, columns - n), sum);
            }
        }
        if (y == nullptr) return;
        float parts[kLanes];
        Level::store(parts, Level::sums(sums));
        args.dw[pair] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }

    static void backward(const RowSumBackwardArgs& args, int64_t first, int64_t last) {
        for (; first < last; ++first)
            args.wide ? gradient_of<float>(args, first) : gradient_of<T>(args, first);
    }

    static RowSumKernels kernels() { return {.sums = sums, .backward = backward}; }
};

}  // namespace grouped
}  // namespace peftcore
