// RMSNorm and its gradients: two passes over a row, which stays in a cache, in fp32. Formulas: peftcore/ops/rms_norm.py.
// Sums have 16 lanes at every level and are double over a row, so that all levels give the same bits.
#pragma once

#include <cmath>

#include "norms/cpu/kernels.h"
#include "simd/chunk.h"

namespace peftcore {
namespace norms {

using namespace simd;

template <typename Level>
struct RmsNorm {
    using T = typename Level::T;
    using Chunk = simd::Chunk<Level>;
    static constexpr int64_t kSums = 16;
    static_assert(kSums == kNormPadding && kSums % Level::kLanes == 0);

    // Columns of a chunk, with zeros up to a multiple of kSums.
    static void load(const T* row, int64_t n, int64_t columns, Chunk& chunk) {
        const int64_t count = std::min(kChunk, columns - n), filled = filled_up(count, kSums);
        chunk.load(row + n, count);
        for (int64_t i = count; i < filled; ++i) chunk.value[i] = 0;
    }

    template <typename Value>
    static double sum(int64_t filled, const Value& value) {
        float lanes[kSums] = {};
        for (int64_t i = 0; i < filled; i += kSums)
            for (int64_t j = 0; j < kSums; ++j) lanes[j] += value(i + j);
        double total = 0;
        for (const float lane : lanes) total += lane;
        return total;
    }

    static void forward(const RmsNormArgs& args, int64_t first, int64_t last) {
        Chunk x;
        const int64_t columns = args.columns;
        for (; first < last; ++first) {
            const T* from = static_cast<const T*>(args.x) + first * columns;
            T* to = static_cast<T*>(args.y) + first * columns;
            double squares = 0;
            for (int64_t n = 0; n < columns; n += kChunk) {
                load(from, n, columns, x);
                squares += sum(filled_up(std::min(kChunk, columns - n), kSums),
                               [&](int64_t i) { return x.value[i] * x.value[i]; });
            }
            const float r = 1.0f / std::sqrt(float(squares / double(columns)) + args.eps);
            args.scale[first] = r;
            for (int64_t n = 0; n < columns; n += kChunk) {
                const int64_t count = std::min(kChunk, columns - n), filled = filled_up(count, kSums);
                if (columns > kChunk) load(from, n, columns, x);
                for (int64_t i = 0; i < filled; ++i) x.value[i] *= r;
                if (args.rounded) x.round(filled);
                for (int64_t i = 0; i < filled; ++i) x.value[i] *= args.g[n + i];
                x.store(to + n, count);
            }
        }
    }

    static void backward(const RmsNormBackwardArgs& args, int64_t first, int64_t last) {
        Chunk x, dy;
        const int64_t columns = args.columns;
        for (; first < last; ++first) {
            const T* from = static_cast<const T*>(args.x) + first * columns;
            const T* grad = static_cast<const T*>(args.dy) + first * columns;
            const float r = args.scale[first];
            float mean = 0;
            if (args.dx != nullptr) {
                double products = 0;
                for (int64_t n = 0; n < columns; n += kChunk) {
                    load(from, n, columns, x);
                    load(grad, n, columns, dy);
                    const float* g = args.g + n;
                    products += sum(filled_up(std::min(kChunk, columns - n), kSums),
                                    [&](int64_t i) { return dy.value[i] * g[i] * (x.value[i] * r); });
                }
                mean = float(products / double(columns));
            }
            for (int64_t n = 0; n < columns; n += kChunk) {
                const int64_t count = std::min(kChunk, columns - n), filled = filled_up(count, kSums);
                const float* g = args.g + n;
                load(from, n, columns, x);
                load(grad, n, columns, dy);
                for (int64_t i = 0; i < filled; ++i) x.value[i] *= r;
                if (args.dx != nullptr) {
                    Chunk dx;
                    for (int64_t i = 0; i < filled; ++i)
                        dx.value[i] = r * (dy.value[i] * g[i] - x.value[i] * mean);
                    dx.store(static_cast<T*>(args.dx) + first * columns + n, count);
                }
                if (args.sums != nullptr) {
                    if (args.rounded) x.round(filled);
                    for (int64_t i = 0; i < filled; ++i) args.sums[n + i] += dy.value[i] * x.value[i];
                }
            }
        }
    }

    static RmsNormKernels kernels() { return {.forward = forward, .backward = backward}; }
};

}  // namespace norms
}  // namespace peftcore
