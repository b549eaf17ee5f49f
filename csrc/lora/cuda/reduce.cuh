// A block's part of R = (keep ∘ W)ᵀ V: 128 columns of W, rows of it 32 at a time, up to 64 ranks of V; and in the
// same pass of P = W Fᵀ, the contribution of these columns. A warp has 32 of the columns; sums over the rows stay in
// registers.
#pragma once

#include "common/cuda_stages.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kReduceRows = 32, kReduceColumns = 128;

struct ReduceTile {
    const void* wide;   // W [.., columns]
    const float* thin;  // V [.., rank]
    int64_t columns;
    int rank, first_rank;
    int64_t first_row, last_row, column;
    Dropout dropout;
    const float* factor;  // F [rank, columns]
    float* product;       // [.., rank]
};

// store(column, rank, sum) for each of them. kRankTiles: of 8 ranks.
template <typename T, int kRankTiles, bool kProduct, typename Store>
__device__ void reduce_tile(const ReduceTile& p, const Store& store) {
    constexpr int kRanks = 8 * kRankTiles;
    using Wide = Tile<T, kReduceRows, kReduceColumns>;
    using Thin = Tile<float, kReduceRows, kRanks>;
    using Factor = Tile<float, kProduct ? kRanks : 1, kReduceColumns>;
    constexpr int kStageBytes = Wide::kBytes + Thin::kBytes;
    constexpr int kStages = kStagesThatFit<kStageBytes, Factor::kBytes>;
    static_assert(kStages >= 2, "");
    PEFTCORE_SHARED(uint8_t, memory, [kStages * kStageBytes]);
    PEFTCORE_SHARED(uint8_t, factor_tile, [Factor::kBytes]);

    const Source<T> wide(p.wide, p.columns);
    const Source<float> thin(p.thin, p.rank);
    const auto fetch_stage = [&](int64_t row, int slot) {
        uint8_t* to = memory + slot * kStageBytes;
        fetch<Wide>(to, wide, row, p.last_row, p.column, p.columns);
        fetch<Thin>(to + Wide::kBytes, thin, row, p.last_row, p.first_rank, p.rank);
    };
    const auto drop_stage = [&](int64_t row, int slot) {
        if (p.dropout.threshold != 0)
            drop<Wide>(memory + slot * kStageBytes, p.dropout, row, p.last_row, p.column);
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[2][kRankTiles][4] = {};
    if constexpr (kProduct)  // arrives with the first stage
        fetch<Factor>(factor_tile, Source<float>(p.factor, p.columns), 0, p.rank, p.column, p.columns);
    const auto add_stage = [&](int64_t row, int slot) {
        const uint8_t *input = memory + slot * kStageBytes, *thin = input + Wide::kBytes;
#pragma unroll
        for (int step = 0; step < kReduceRows; step += 16) {
            Left<T> left[2];  // columns of W are rows of the result
#pragma unroll
            for (int c = 0; c < 2; ++c) load_left_across<Wide>(left[c], input, step, warp * 32 + c * 16);
#pragma unroll
            for (int t = 0; t < kRankTiles; t += 2) {
                if (p.first_rank + t * 8 >= p.rank) break;
                Tf32Right right[2];
                load_right<Thin, true>(right, thin, t * 8, step);
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int i = 0; i < 2; ++i) multiply<T>(d[c][t + i], left[c], right[i]);
            }
        }
        if constexpr (kProduct) {  // a warp has 16 rows and 8 ranks
            static_assert(kReduceRows == 32 && kRankTiles == 2 && kWarps == 4, "");
            const int warp_row = warp % 2 * 16, warp_rank = warp / 2 * 8;
            float e[4] = {};
#pragma unroll
            for (int k = 0; k < kReduceColumns; k += 16) {
                Left<T> left;
                load_left<Wide>(left, input, warp_row, k);
                Tf32Right right[1];
                load_right<Factor>(right, factor_tile, warp_rank, k);
                multiply<T>(e, left, right[0]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t m = row + warp_row + lane / 4 + i / 2 * 8;
                const int j = warp_rank + lane % 4 * 2 + i % 2;
                if (m < p.last_row && j < p.rank) p.product[m * p.rank + j] = e[i];
            }
        }
    };
    for_stages<kStages>(p.first_row, p.last_row, kReduceRows, fetch_stage, drop_stage, add_stage);

#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int t = 0; t < kRankTiles; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t k = p.column + warp * 32 + c * 16 + lane / 4 + i / 2 * 8;
                const int j = p.first_rank + t * 8 + lane % 4 * 2 + i % 2;
                if (k < p.columns && j < p.rank) store(k, j, d[c][t][i]);
            }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore
