// What zero points add to results (see kernels.h), compiled at each SIMD level by the compiler's vectors.
#pragma once

#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kZeroLanes = 16;  // sums that do not wait for one another

template <typename T>
void sum_blocks_as(const T* x, int64_t blocks, int64_t size, float* out) {
    for (int64_t b = 0; b < blocks; ++b, x += size) {
        float lanes[kZeroLanes] = {}, values[kMinBlocksize];
        for (int64_t k = 0; k < size; k += kMinBlocksize) {
            widen(x + k, kMinBlocksize, values);
            for (int i = 0; i < kMinBlocksize; ++i) lanes[i % kZeroLanes] += values[i];
        }
        float sum = 0;
        for (const float lane : lanes) sum += lane;
        out[b] = sum;
    }
}

void sum_blocks(const void* x, Dtype dtype, int64_t batch, int64_t columns, int shift, float* out) {
    const int64_t size = int64_t(1) << shift, blocks = batch * (columns >> shift);
    if (dtype == Dtype::kFloat) return sum_blocks_as(static_cast<const float*>(x), blocks, size, out);
    if (dtype == Dtype::kHalf) return sum_blocks_as(static_cast<const Half*>(x), blocks, size, out);
    return sum_blocks_as(static_cast<const BFloat16*>(x), blocks, size, out);
}

void zeros_addend(const WeightView& weight, const float* sums, int64_t batch, int64_t first, int64_t last,
                  float* out) {
    constexpr int kAtOnce = 64;  // blocks
    const AffineScales scales(weight);
    const int64_t blocks = weight.columns >> weight.shift;
    for (int64_t n = first; n < last; ++n)
        for (int64_t begin = 0; begin < blocks; begin += kAtOnce) {
            const int64_t count = blocks - begin < kAtOnce ? blocks - begin : kAtOnce;
            const int64_t block = n * blocks + begin;
            alignas(64) float factors[kAtOnce];
            scales.copy(block, block + count, factors);
            if (weight.whole_zeros) {
                const uint8_t* zeros = static_cast<const uint8_t*>(weight.zeros) + block;
                for (int64_t i = 0; i < count; ++i) factors[i] *= float(kCentre - int(zeros[i]));
            } else {
                const float* zeros = static_cast<const float*>(weight.zeros) + block;
                for (int64_t i = 0; i < count; ++i) factors[i] *= float(kCentre) - zeros[i];
            }
            for (int64_t m = 0; m < batch; ++m) {
                const float* x = sums + m * blocks + begin;
                float lanes[kZeroLanes] = {}, sum = 0;
                int64_t i = 0;
                for (; i + kZeroLanes <= count; i += kZeroLanes)
                    for (int lane = 0; lane < kZeroLanes; ++lane)
                        lanes[lane] += factors[i + lane] * x[i + lane];
                for (; i < count; ++i) sum += factors[i] * x[i];
                for (const float lane : lanes) sum += lane;
                float& to = out[m * weight.rows + n];
                to = begin == 0 ? sum : to + sum;
            }
        }
}

constexpr ZeroPoints kZeroPoints{.sum_blocks = sum_blocks, .addend = zeros_addend};

}  // namespace
}  // namespace quant4
}  // namespace peftcore
