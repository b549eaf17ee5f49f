// What zero points add to results (see kernels.h), compiled at each SIMD level by the compiler's vectors.
#pragma once

#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kZeroLanes = 16;  // sums that do not wait for one another, and rows of W together
typedef float Lanes __attribute__((vector_size(kZeroLanes * sizeof(float))));
constexpr int kZeroBlocks = 64;  // blocks of a row together

inline float sum_of_lanes(float (&lanes)[kZeroLanes]) {
#pragma GCC unroll 4
    for (int step = kZeroLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

template <typename T>
void sum_blocks_as(const T* x, int64_t blocks, int64_t size, float* out) {
    for (int64_t b = 0; b < blocks; ++b, x += size) {
        float lanes[kZeroLanes] = {}, values[kMinBlocksize];
        for (int64_t k = 0; k < size; k += kMinBlocksize) {
            widen(x + k, kMinBlocksize, values);
            for (int i = 0; i < kZeroLanes; ++i) lanes[i] += values[i] + values[kZeroLanes + i];
        }
        out[b] = sum_of_lanes(lanes);
    }
}

void sum_blocks(const void* x, Dtype dtype, int64_t batch, int64_t columns, int shift, float* out) {
    const int64_t size = int64_t(1) << shift, blocks = batch * (columns >> shift);
    if (dtype == Dtype::kFloat) return sum_blocks_as(static_cast<const float*>(x), blocks, size, out);
    if (dtype == Dtype::kHalf) return sum_blocks_as(static_cast<const Half*>(x), blocks, size, out);
    return sum_blocks_as(static_cast<const BFloat16*>(x), blocks, size, out);
}

// What a block's sum of x is multiplied by, of `count` blocks from `block` on.
inline void zero_factors(const WeightView& weight, int64_t block, int64_t count, float* out) {
    AffineScales(weight).copy(block, block + count, out);
    if (weight.whole_zeros) {
        const uint8_t* zeros = static_cast<const uint8_t*>(weight.zeros) + block;
        for (int64_t i = 0; i < count; ++i) out[i] *= float(kCentre - int(zeros[i]));
    } else {
        const float* zeros = static_cast<const float*>(weight.zeros) + block;
        for (int64_t i = 0; i < count; ++i) out[i] *= float(kCentre) - zeros[i];
    }
}

// kZeroLanes rows of W at a time, so that no lanes are added up.
void add_by_block(const WeightView& weight, const float* sums, int64_t batch, int64_t first, int64_t last,
                  int64_t begin, int64_t count, float* out) {
    const int64_t blocks = weight.columns >> weight.shift;
    alignas(64) float by_block[kZeroBlocks][kZeroLanes] = {};
    for (int64_t n = first; n < last; n += kZeroLanes) {
        const int64_t rows = least(last - n, kZeroLanes);
        for (int64_t r = 0; r < rows; ++r) {
            alignas(64) float factors[kZeroBlocks];
            zero_factors(weight, (n + r) * blocks + begin, count, factors);
            for (int64_t b = 0; b < count; ++b) by_block[b][r] = factors[b];
        }
        for (int64_t m = 0; m < batch; ++m) {
            const float* x = sums + m * blocks + begin;
            Lanes sum = {}, values;
            for (int64_t b = 0; b < count; ++b) {
                memcpy(&values, by_block[b], sizeof values);
                sum += values * x[b];
            }
            float lanes[kZeroLanes];
            memcpy(lanes, &sum, sizeof lanes);
            float* to = out + m * weight.rows + n;
            for (int64_t r = 0; r < rows; ++r) to[r] = lanes[r] + (begin == 0 ? 0 : to[r]);
        }
    }
}

void zeros_addend(const WeightView& weight, const float* sums, int64_t batch, int64_t first, int64_t last,
                  float* out) {
    const int64_t blocks = weight.columns >> weight.shift;
    for (int64_t begin = 0; begin < blocks; begin += kZeroBlocks) {
        const int64_t count = least(blocks - begin, kZeroBlocks);
        add_by_block(weight, sums, batch, first, last, begin, count, out);
    }
}

constexpr ZeroPoints kZeroPoints{.sum_blocks = sum_blocks, .addend = zeros_addend};

}  // namespace
}  // namespace quant4
}  // namespace peftcore
