// A block's part of y = x Wᵀ + b + s Fᵀ for few rows of x, directly from 4 bits: 16 rows of W, which are the 16 rows of
// an mma; x's rows are its columns. The warps of a block divide the columns of W in stages, which arrive by cp.async,
// several of them pending at a time, and add their sums in shared memory in a fixed order. A weight is code * scale in
// fp32, rounded once to x's dtype: the same bits as dequantization. s and F are a few more columns of x and W in the
// same sums, which are rounded once.
#pragma once

#include "common/alignment.h"
#include "common/cuda_launch.cuh"
#include "common/cuda_stages.cuh"
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

// A warp's stage in shared memory: 16 rows of W and kTiles * 8 rows of x, of kStage columns and 16 bytes that
// spread rows over the banks.
template <int kTiles, int kStage>
struct Stage {
    alignas(16) uint8_t weight[kRows][kStage / 2 + 16];
    alignas(16) uint8_t input[kTiles * 8][kStage * 2 + 16];
};

// Begins to fetch a stage from column `k` on. Values out of range of either matrix are zero.
template <typename T, int kTiles, int kStage>
__device__ __forceinline__ void fetch(const LinearLaunch& p, int64_t n, int64_t k, int lane,
                                      Stage<kTiles, kStage>& to) {
    constexpr int kWeightPieces = kStage / 32, kInputPieces = kStage / 8;  // of 16 bytes, in a row
    if (lane < kRows * kWeightPieces) {
        const int row = lane / kWeightPieces, piece = lane % kWeightPieces;
        const int64_t column = k + piece * 32;
        const bool inside = n + row < p.weight.rows && column < p.weight.columns;
        const int64_t offset = inside ? ((n + row) * p.weight.columns + column) / 2 : 0;
        cp_async_16(&to.weight[row][piece * 16], p.weight.codes + offset, inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kTiles * 8 * kInputPieces / 32; ++i) {
        const int row = (i * 32 + lane) / kInputPieces, piece = lane % kInputPieces;
        const int64_t column = k + piece * 8;
        const bool inside = row < p.batch && column < p.weight.columns;
        const int64_t offset = inside ? row * p.weight.columns + column : 0;
        cp_async_16(&to.input[row][piece * 16], static_cast<const T*>(p.x) + offset, inside ? 16 : 0);
    }
}

// Rows of W from `n` on. kTiles: of 8 rows of x. kStage: columns of a stage. kStages: of a warp, all but one pending.
template <typename T, int kTiles, int kStage, int kStages>
__device__ void tensor_tile(const LinearLaunch& p, int64_t n) {
    using WarpStage = Stage<kTiles, kStage>;
    using Scales = AnyScales<true>;
    using Sums = float[kWarps][kTiles * 8][kRows + 1];
    constexpr int kStageBytes = kWarps * kStages * int(sizeof(WarpStage));
    constexpr int kBytes = kStageBytes > int(sizeof(Sums)) ? kStageBytes : int(sizeof(Sums));
    PEFTCORE_SHARED(float, quant_map, [16]);
    PEFTCORE_SHARED(float, nested_quant_map, [Scales::kEntries]);
    PEFTCORE_SHARED(uint8_t, memory, [kBytes]);  // stages, and after they have been read, sums

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4;  // of mma fragments: rows group and group + 8
    WarpStage* slots = reinterpret_cast<WarpStage*>(memory) + warp * kStages;
    const Scales scales = Scales::load(p.weight, quant_map, nested_quant_map);
    __syncthreads();

    float d[1][kTiles][4] = {};
    const auto fetch_stage = [&](int64_t k, int slot) { fetch<T>(p, n, k, lane, slots[slot]); };
    const auto add_stage = [&](int64_t k, int slot) {
        const WarpStage& now = slots[slot];
#pragma unroll
        for (int half = 0; half < kStage / 32; ++half) {  // 32 columns, of one or two blocks
            ScaleAndZero scale[2] = {};
            float sum[kTiles][4] = {};
            uint4 words[2];
            const auto read_scales = [&](int64_t column) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int64_t row = n + group + 8 * r;
                    if (row < p.weight.rows && column < p.weight.columns)
                        scale[r] = scales.of(
                            p.weight,
                            scales.stored(p.weight, (row * p.weight.columns + column) >> p.weight.shift));
                }
            };
            read_scales(k + half * 32);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                words[r] = *reinterpret_cast<const uint4*>(&now.weight[group + 8 * r][half * 16]);
#pragma unroll
            for (int step = 0; step < 2;
                 ++step) {  // 16 columns: two words of eight, of which a lane has a byte
                if (step == 1 && p.weight.shift == 4) read_scales(k + half * 32 + 16);
                const uint32_t low[2] = {step ? words[0].z : words[0].x, step ? words[1].z : words[1].x};
                const uint32_t high[2] = {step ? words[0].w : words[0].y, step ? words[1].w : words[1].y};
                uint32_t a[4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    a[r] = value_pair<T>(quant_map, low[r] >> 8 * pair, scale[r]);
                    a[2 + r] = value_pair<T>(quant_map, high[r] >> 8 * pair, scale[r]);
                }
                const int column = half * 32 + step * 16;
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    uint32_t b[2];
                    const int row = tile * 8 + lane % 8, part = lane / 8 % 2;
                    ldmatrix_x2(b, &now.input[row][(column + part * 8) * 2]);
                    mma_m16n8k16<T>(sum[tile], a, b);
                }
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) add_to(d[0][tile], sum[tile]);
        }
    };
    for_stages<kStages, Readers::kWarp>(warp * kStage, p.weight.columns, kWarps * kStage, fetch_stage,
                                        NothingToDo(), add_stage);

    for (int j = warp * 16; j < p.rank; j += kWarps * 16) add_ranks(p, n, j, d);
    __syncthreads();  // stages have been read

    Sums& sums = *reinterpret_cast<Sums*>(memory);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[warp][tile * 8 + pair * 2 + i % 2][group + i / 2 * 8] = d[0][tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kTiles * 8 * kRows; i += kThreads) {
        const int m = i / kRows, row = i % kRows;
        if (m >= p.batch || n + row >= p.weight.rows) continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += sums[w][m][row];
        store_result<T>(p, m, n + row, total);
    }
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
