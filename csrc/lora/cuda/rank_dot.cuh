// A block's part of s = c (keep ∘ x) Aᵀ for few rows of x: one rank. Its threads divide the columns.
#pragma once

#include "common/typed.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

struct RankDot {
    const void* x;
    int64_t row;  // the first, as dropout counts them
    int rows;     // at most kRankDotRows
    int64_t columns;
    const void* factor;  // a row of A
    Dtype factor_dtype;
    Dropout dropout;
    float scale;
    float* out;  // of the first row
    int stride;
};

// Eight values from column k on, zero behind the last.
template <typename T>
__device__ __forceinline__ void load_eight(const T* row, int64_t k, int64_t columns, bool vectors,
                                           float (&values)[8]) {
    union {
        uint4 vectors[sizeof(T) / 2];
        T items[8];
    } loaded = {};
    if (vectors) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i)
            if (k < columns) loaded.vectors[i] = reinterpret_cast<const uint4*>(row + k)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (k + i < columns) loaded.items[i] = row[k + i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(loaded.items[i]);
}

// kMostRows: no more rows of x; kAligned: they begin on 16 bytes and have vectors of eight. Both only make less code.
template <typename T, int kMostRows = kRankDotRows, bool kAligned = false>
__device__ void rank_dot(const RankDot& p) {
    constexpr int kAhead = 4;  // groups of eight columns that a thread loads together
    PEFTCORE_SHARED(float, sums, [kWarps][kMostRows]);
    const bool vectors = kAligned || (is_aligned(p.x) && p.columns % 8 == 0);
    const bool factor_vectors = is_aligned(p.factor) && p.columns % 8 == 0;
    float total[kMostRows] = {};
    for (int64_t first = threadIdx.x * 8; first < p.columns; first += kAhead * kThreads * 8) {
        float factor[kAhead][8], values[kAhead][8];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const int64_t k = first + a * kThreads * 8;
            if (p.factor_dtype == Dtype::kFloat)
                load_eight(static_cast<const float*>(p.factor), k, p.columns, factor_vectors, factor[a]);
            else if (p.factor_dtype == Dtype::kHalf)
                load_eight(static_cast<const Half*>(p.factor), k, p.columns, factor_vectors, factor[a]);
            else
                load_eight(static_cast<const BFloat16*>(p.factor), k, p.columns, factor_vectors, factor[a]);
        }
#pragma unroll
        for (int m = 0; m < kMostRows; ++m) {
            if (m >= p.rows) break;
            const T* row = static_cast<const T*>(p.x) + m * p.columns;
#pragma unroll
            for (int a = 0; a < kAhead; ++a)
                load_eight(row, first + a * kThreads * 8, p.columns, vectors, values[a]);
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                if (p.dropout.threshold != 0) {
                    const int64_t k = first + a * kThreads * 8;
                    const PhiloxWords words = dropout_words(p.dropout, p.row + m, k / kColumnsPerCounter);
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        if (!keeps(words, i, p.dropout.threshold)) values[a][i] = 0;
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) total[m] += values[a][i] * factor[a][i];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kMostRows; ++m) {
        if (m >= p.rows) break;
        for (int distance = 16; distance > 0; distance /= 2)
            total[m] += __shfl_xor_sync(0xffffffffu, total[m], distance);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][m] = total[m];
    }
    __syncthreads();
    const int m = threadIdx.x;
    if (m < p.rows) {
        float all = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) all += sums[w][m];
        p.out[m * p.stride] = p.scale * all;
    }
    __syncthreads();  // before another rank
}

}  // namespace
}  // namespace lora
}  // namespace peftcore
