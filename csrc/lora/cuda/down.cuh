// A block's part of s = c (keep ∘ x) Aᵀ: 16 or 64 rows of x, up to 64 ranks.
//
// x and A arrive by cp.async in stages of columns, several of them pending at a time. A thread applies dropout in
// shared memory to the 16 bytes that it fetched: one Philox call for eight elements. The four warps divide the rows, or
// with 16 rows the columns of a stage; their sums are added in a fixed order.
#pragma once

#include "common/cuda_stages.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

struct DownTile {
    const void* x;
    int64_t columns;        // of x
    int64_t row, last_row;  // of x as one matrix, as dropout counts them
    int64_t first_column, last_column;
    const float* factor;  // A [rank, columns], or across it [columns, rank]
    int rank, first_rank;
    Dropout dropout;
    float scale;
    float* out;  // [.., stride]
    int stride;
};

// kRowTiles: of 16 rows of x. kRankTiles: of 8 ranks.
template <typename T, int kRowTiles, int kRankTiles, bool kAcross = false>
__device__ void down_tile(const DownTile& p) {
    constexpr int kRows = 16 * kRowTiles, kRanks = 8 * kRankTiles, kStage = kRowTiles == 1 ? 64 : 32;
    constexpr int kParts = kWarps / kRowTiles;  // warps that share rows
    using Input = Tile<T, kRows, kStage>;
    using Factor = Tile<float, kAcross ? kStage : kRanks, kAcross ? kRanks : kStage>;
    constexpr int kStageBytes = Input::kBytes + Factor::kBytes, kStages = kStagesThatFit<kStageBytes>;
    static_assert(kStages >= 2 && kParts * kRows * (kRanks + 1) * 4 <= kStages * kStageBytes, "");
    PEFTCORE_SHARED(uint8_t, memory, [kStages * kStageBytes]);

    const Source<T> x(p.x, p.columns);
    const Source<float> a(p.factor, kAcross ? p.rank : p.columns);
    const auto fetch_stage = [&](int64_t column, int slot) {
        uint8_t* to = memory + slot * kStageBytes;
        fetch<Input>(to, x, p.row, p.last_row, column, p.last_column);
        if constexpr (kAcross)
            fetch<Factor>(to + Input::kBytes, a, column, p.last_column, p.first_rank, p.rank);
        else
            fetch<Factor>(to + Input::kBytes, a, p.first_rank, p.rank, column, p.last_column);
    };
    const auto drop_stage = [&](int64_t column, int slot) {
        if (p.dropout.threshold != 0)
            drop<Input>(memory + slot * kStageBytes, p.dropout, p.row, p.last_row, column);
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % kRowTiles * 16, part = warp / kRowTiles;
    float d[kRankTiles][4] = {};
    const auto add_stage = [&](int64_t, int slot) {
        const uint8_t* input = memory + slot * kStageBytes;
#pragma unroll
        for (int step = 0; step < kStage / 16 / kParts; ++step) {
            const int column = (step * kParts + part) * 16;
            Left<T> left;
            load_left<Input>(left, input, warp_row, column);
#pragma unroll
            for (int t = 0; t < kRankTiles; t += 2) {
                if (p.first_rank + t * 8 >= p.rank) break;
                Tf32Right right[2];
                load_right<Factor, kAcross>(right, input + Input::kBytes, t * 8, column);
                multiply<T>(d[t], left, right[0]);
                multiply<T>(d[t + 1], left, right[1]);
            }
        }
    };
    for_stages<kStages>(p.first_column, p.last_column, kStage, fetch_stage, drop_stage, add_stage);
    __syncthreads();  // stages have been read: their memory is free

    auto sums = reinterpret_cast<float (*)[kRows][kRanks + 1]>(memory);
#pragma unroll
    for (int t = 0; t < kRankTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[part][warp_row + lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = d[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
        const int r = i / kRanks, j = i % kRanks;
        if (p.row + r >= p.last_row || p.first_rank + j >= p.rank) continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kParts; ++w) total += sums[w][r][j];
        p.out[(p.row + r) * p.stride + p.first_rank + j] = p.scale * total;
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore
