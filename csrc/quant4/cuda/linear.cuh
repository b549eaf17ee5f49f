// What the kernels of y = x Wᵀ + b + s Fᵀ for few rows of x, directly from 4 bits, share (rows.cuh, panel.cuh). 16 rows
// of W are the 16 rows of an mma, x's rows its columns. s and F are a few more columns of x and W in the same sums, which
// are rounded once.
#pragma once

#include "common/alignment.h"
#include "common/cuda_launch.cuh"
#include "common/half.h"
#include "common/tensor_core.cuh"
#include "common/tf32.cuh"
#include "quant4/cuda/block_scale.cuh"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16;  // of W in a block

struct LinearLaunch {
    WeightView weight;
    int batch;  // rows of x
    const void* x;
    const void* bias;            // of x's dtype, or nullptr
    const float *thin, *factor;  // s [batch, rank] and F
    int rank;                    // 0: neither
    void* y;
    // For panel_tile, where blocks divide the columns of W: they form a cluster, or leave partial sums [splits, batch,
    // rows] and have a counter for each block of rows; nullptr: another launch adds the sums.
    float* partial;
    unsigned* tickets;
    bool clusters;
};

// Whether x and the codes of W are pieces of 16 bytes.
inline bool in_pieces(const void* x, const WeightView& weight) {
    return weight.columns % 32 == 0 && is_aligned(x) && is_aligned(weight.codes);
}

template <typename T>
__device__ __forceinline__ void store_result(const LinearLaunch& p, int64_t m, int64_t n, float sum) {
    if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.y)[m * p.weight.rows + n] = from_float<T>(sum);
}

// s and F, with zeros behind the last rank and row.
__device__ __forceinline__ float thin_value(const LinearLaunch& p, int64_t m, int j) {
    return m < p.batch && j < p.rank ? p.thin[m * p.rank + j] : 0;
}
__device__ __forceinline__ float factor_value(const LinearLaunch& p, int64_t n, int j) {
    return n < p.weight.rows && j < p.rank ? p.factor[n * p.rank + j] : 0;
}

// Adds s Fᵀ of the 16 ranks from `j` on to sums of 16 rows of W each, from `n` on: 16 more columns.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void add_ranks(const LinearLaunch& p, int64_t n, int j,
                                          float (&d)[kRowTiles][kTiles][4]) {
    const int group = threadIdx.x % 32 / 4;
    Tf32Left a[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            a[t].piece[i / 2][i % 2] =
                tf32_pieces(factor_value(p, n + 16 * t + group + i % 2 * 8, j + tf32_inner(i / 2)));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        Tf32Right b;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            b.piece[i] = tf32_pieces(thin_value(p, tile * 8 + group, j + tf32_inner(i)));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) tf32_multiply(d[t][tile], a[t], b);
    }
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
