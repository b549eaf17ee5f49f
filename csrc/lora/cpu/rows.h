// The thin products for a single row, straight from A and B: for adapters that act on few rows, where
// arranging the factors (see blocks.h) costs more than using them. Products and sums are fp32, factors not
// rounded.
#pragma once

#include "lora/cpu/blocks.h"

namespace peftcore {
namespace lora {

template <typename Level>
struct Rows {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes;
    static constexpr int64_t kChain = 64 * kLanes;  // products of a short sum (see blocks.h)

    static void widen(const void* from, int64_t count, float* to) {
        stage_row<Level>(static_cast<const T*>(from), count, nullptr, to);
    }

    static void add(const float* from, int64_t count, void* to) {
        T* y = static_cast<T*>(to);
        for (int64_t n = 0; n < count; n += kLanes)
            store_some<Level>(y + n, count - n,
                              Level::add(load_some<Level>(y + n, count - n), Level::load(from + n)));
    }

    // The sums over j < inner, for i < outer:
    //   out[i] = x[j] factor[i * inner + j]
    // x and out have room for kLanes more.
    static void multiply(const float* x, const void* matrix, int64_t inner, int64_t outer, float* out) {
        const T* factor = static_cast<const T*>(matrix);
        for (int64_t begin = 0; begin < outer; begin += kLanes) {
            Vector parts[kLanes];
            for (int i = 0; i < kLanes; ++i) parts[i] = Level::zero();
            const int64_t count = std::min<int64_t>(kLanes, outer - begin);
            for (int64_t i = 0; i < count; ++i) {
                const T* row = factor + (begin + i) * inner;
                for (int64_t first = 0; first < inner; first += kChain) {
                    const int64_t last = std::min(inner, first + kChain);
                    Vector sum = Level::zero(), other = Level::zero();
                    int64_t j = first;
                    for (; j + 2 * kLanes <= last; j += 2 * kLanes) {
                        sum = Level::fma(Level::load(x + j), Level::load(row + j), sum);
                        other = Level::fma(Level::load(x + j + kLanes), Level::load(row + j + kLanes), other);
                    }
                    for (; j < last; j += kLanes)
                        sum = Level::fma(load_some<Level>(x + j, last - j),
                                         load_some<Level>(row + j, last - j), sum);
                    parts[i] = Level::add(parts[i], Level::add(sum, other));
                }
            }
            Level::store(out + begin, Level::sums(parts));
        }
    }

    static RowKernels kernels() { return {.widen = widen, .add = add, .multiply = multiply}; }
};

}  // namespace lora
}  // namespace peftcore
