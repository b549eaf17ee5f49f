// A block's part of y = x Wᵀ + b + s Fᵀ for 17 to 64 rows of x, directly from 4 bits: a panel of 128 rows of W, so that
// x is read from L2 once for all of them, and, where that gives too few blocks for a GPU, a part of the columns. The
// sums of the parts are added in order: by the last block, or on GPUs with clusters by each block for a part of x's
// rows, reading the sums from the other blocks' shared memory. Columns are as in rows.cuh.
//
// Four pairs of warps have 32 rows of W each; the two warps of a pair divide the columns. A lane has 64 columns of four
// rows of W at a time, with their values as in rows.cuh: half of the rows by a table, half by shuffles. x arrives by
// cp.async in stages that all warps read: half of each lane's columns, 64 contiguous bytes.
#pragma once

#include "common/cuda_clusters.cuh"
#include "common/cuda_tickets.cuh"
#include "quant4/cuda/rows.cuh"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kPanelThreads = 256, kPanelRows = 128;
constexpr int kSlices = 2;                              // of the columns, a warp each
constexpr int kPanelStep = kSlices * 4 * kLaneColumns;  // columns
constexpr int kHalf = kLaneColumns / 2;                 // columns of a lane in one stage
constexpr int kPanelStages = 3, kStageColumns = kPanelStep / 2, kStagePieces = kStageColumns / 8;

// Shared memory of a block: stages of x, and after they have been read, the sums of both slices.
template <int kTiles>
constexpr int panel_bytes() {
    constexpr int stages = kPanelStages * kTiles * 8 * kStageColumns * 2;
    constexpr int sums = kSlices * kTiles * 8 * (kPanelRows + 1) * 4;
    return stages > sums ? stages : sums;
}

// Position of a 16-byte piece of x in its row of a stage: eight lanes that read together have no bank conflicts.
__device__ __forceinline__ int place_of_piece(int row, int piece) {
    return piece ^ ((piece >> 2 & 2) | (row & 1));
}

// Rows of W from `first_row` on, columns [begin, end). kTiles: of 8 rows of x. The first split adds b and s Fᵀ.
template <typename T, int kTiles, typename Scales>
__device__ void panel_tile(const LinearLaunch& p, int64_t first_row, uint32_t begin, uint32_t end, int split,
                           int splits) {
    using XStage = uint4[kTiles * 8][kStagePieces];
    using Sums = float[kSlices][kTiles * 8][kPanelRows + 1];
    PEFTCORE_SHARED(float, quant_map, [16]);
    PEFTCORE_SHARED(float, nested_quant_map, [Scales::kEntries]);
    PEFTCORE_DYNAMIC_SHARED(memory);
    XStage* stages = reinterpret_cast<XStage*>(memory);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4;  // of mma fragments
    const int slice = warp % kSlices;
    const int64_t warp_row = first_row + warp / kSlices * 32;
    const uint32_t columns = uint32_t(p.weight.columns);
    const uint32_t lane_column = begin + (slice * 4 + pair) * kLaneColumns;

    uint32_t row_block[4];  // of 64 columns; rows behind the last repeat it, and are not stored
#pragma unroll
    for (int r = 0; r < 4; ++r)
        row_block[r] =
            uint32_t(least(warp_row + group + 8 * r, p.weight.rows - 1)) * (columns / kLaneColumns);

    const auto fetch_x = [&](int stage) {  // values out of range are zero
        const int slot = stage % kPanelStages, piece = lane;
        const uint32_t column =
            begin + stage / 2 * kPanelStep + piece / 4 * kLaneColumns + stage % 2 * kHalf + piece % 4 * 8;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const int row = i * 8 + warp;
            const bool inside = row < p.batch && column < end;
            const T* from = static_cast<const T*>(p.x) + (inside ? row * columns + column : 0);
            cp_async_16(&stages[slot][row][place_of_piece(row, piece)], from, inside ? 16 : 0);
        }
        cp_async_commit();
    };
    uint4 ahead[4][2];                                       // codes
    constexpr int kAhead = kTiles < 8 ? Scales::kLoads : 1;  // of a row; of 64 rows, more would not fit
    StoredScale scale_ahead[4][kAhead];
    const auto block_at = [&](int r, uint32_t k) {  // behind a row its end is repeated
        return row_block[r] + (lane_column + k < end ? lane_column + k : end - kLaneColumns) / kLaneColumns;
    };
    const auto fetch_codes = [&](int half, uint32_t k) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
            ahead[r][half] =
                load_16_bytes(p.weight.codes + uint64_t(block_at(r, k)) * (kLaneColumns / 2) + 16 * half);
    };
    const auto fetch_scales = [&](int half, uint32_t k) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
            scale_ahead[r][half % kAhead] = Scales::stored(p.weight, block_at(r, k), half);
    };
    const int stage_count = 2 * int(ceil_div(end - begin, kPanelStep));
    fetch_x(0);
    fetch_x(1);
    const Scales scales = Scales::load(p.weight, quant_map, nested_quant_map);

    float d[2][kTiles][4] = {};
    if (split == 0)
        for (int j = slice * 16; j < p.rank; j += kSlices * 16) add_ranks(p, warp_row, j, d);
    fetch_codes(0, 0);
    fetch_codes(1, 0);
#pragma unroll
    for (int half = 0; half < kAhead; ++half)
        if (Scales::loads(p.weight, half)) fetch_scales(half, 0);
    __syncthreads();
    const float value_of_lane = quant_map[lane % 16];

    // Not for_stages: a step has two stages, which take the halves of its codes in registers, and needs almost all of those.
    for (int step = 0; 2 * step < stage_count; ++step) {
        const uint32_t next = (step + 1) * kPanelStep;
        StoredScale stored[4];
        typename Scales::Decoded scale[4];
        ValueTable tables[2];
        const auto decode = [&](int sixteen) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                scale[r] = scales.decode(p.weight, stored[r], sixteen);
                if (lane_column + next - kPanelStep >= end) scale[r] = {};
            }
        };
        const auto make_tables = [&] {
#pragma unroll
            for (int t = 0; t < 2; ++t) tables[t] = value_table<T>(quant_map, scale[2 * t]);
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (Scales::loads(p.weight, half)) {
#pragma unroll
                for (int r = 0; r < 4; ++r) stored[r] = scale_ahead[r][half % kAhead];
                if (!Scales::kSixteens) decode(0);
                if (kAhead == 1 && half == 0 && Scales::loads(p.weight, 1))
                    fetch_scales(1, next - kPanelStep);
                else
                    fetch_scales(half % kAhead, next);
                if (!Scales::kSixteens) make_tables();
            }
            const int stage = 2 * step + half;
            cp_async_wait<kPanelStages - 2>();
            __syncthreads();  // this stage has arrived, and the previous one has been read
            if (stage + kPanelStages - 1 < stage_count)
                fetch_x(stage + kPanelStages - 1);
            else
                cp_async_commit();
            const XStage& now = stages[stage % kPanelStages];
#pragma unroll(kTiles < 8 ? 2 : 1)  // 64 rows: more than two words at a time would not fit in registers
            for (int i = 0; i < 2;
                 ++i) {  // two words, 16 columns of a lane, are added up by the tensor cores
                if (Scales::kSixteens) {
                    decode(2 * half + i);
                    make_tables();
                }
                uint32_t upper[2][2][4], lower[2][2][4];
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const uint4 &four = ahead[2 * t][half], &other = ahead[2 * t + 1][half];
                    eight_values(i == 0 ? four.x : four.z, tables[t], upper[t][0]);
                    eight_values(i == 0 ? four.y : four.w, tables[t], upper[t][1]);
                    eight_values<T>(i == 0 ? other.x : other.z, value_of_lane, scale[2 * t + 1], lower[t][0]);
                    eight_values<T>(i == 0 ? other.y : other.w, value_of_lane, scale[2 * t + 1], lower[t][1]);
                }
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const int row = tile * 8 + group;
                    float sum[2][4] = {};
#pragma unroll
                    for (int w = 0; w < 2; ++w) {
                        const uint4 piece = now[row][place_of_piece(row, (slice * 4 + pair) * 4 + 2 * i + w)];
#pragma unroll
                        for (int t = 0; t < 2; ++t) {
                            const uint32_t (&u)[4] = upper[t][w], (&l)[4] = lower[t][w];
                            mma_m16n8k16<T>(sum[t], {u[0], l[0], u[1], l[1]}, {piece.x, piece.y});
                            mma_m16n8k16<T>(sum[t], {u[2], l[2], u[3], l[3]}, {piece.z, piece.w});
                        }
                    }
                    add_to(d[0][tile], sum[0]);
                    add_to(d[1][tile], sum[1]);
                }
            }
            fetch_codes(half, next);  // these have been read
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // stages have been read

    Sums& sums = *reinterpret_cast<Sums*>(memory);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[slice][tile * 8 + pair * 2 + i % 2][warp / kSlices * 32 + t * 16 + group + i / 2 * 8] =
                    d[t][tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kTiles * 8 * kPanelRows; i += kPanelThreads) {
        const int m = i / kPanelRows, row = i % kPanelRows;
        const int64_t n = first_row + row;
        if (m >= p.batch || n >= p.weight.rows) continue;
        float total = 0;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) total += sums[s][m][row];
        if (splits == 1) {
            store_result<T>(p, m, n, total);
            continue;
        }
        if (split == 0 && p.bias != nullptr) total += to_float(static_cast<const T*>(p.bias)[n]);
        if (p.clusters)
            sums[0][m][row] = total;
        else
            p.partial[(int64_t(split) * p.batch + m) * p.weight.rows + n] = total;
    }
    if (splits > 1 && p.clusters) {
        constexpr int kPitch = kPanelRows + 1;
        const int rows = kTiles * 8 / splits;  // of x, that this block adds
        const auto place = [&](int i) -> SumPlace {
            const int m = split * rows + i / kPanelRows, row = i % kPanelRows;
            return {i < rows * kPanelRows && m < p.batch && first_row + row < p.weight.rows,
                    m * kPitch + row};
        };
        const auto term = [&](unsigned part, int64_t at) {
            return shared_of_block(part, &sums[0][0][0] + at);
        };
        cluster_sync();
        add_in_order<kPanelThreads, 4>(
            rows * kPanelRows, unsigned(splits), place, term, [&](int64_t at, float sum) {
                const int64_t m = int(at) / kPitch, n = first_row + int(at) % kPitch;
                static_cast<T*>(p.y)[m * p.weight.rows + n] = from_float<T>(sum);
            });
        cluster_sync();  // no block ends before its sums have been read
    }
    const auto place = [&](int i) -> SumPlace {
        const int64_t m = i / kPanelRows, n = first_row + i % kPanelRows;
        return {m < p.batch && n < p.weight.rows, m * p.weight.rows + n};
    };
    add_by_last<kPanelThreads, kTiles * 8 * kPanelRows, 8>(
        p.tickets == nullptr ? nullptr : p.tickets + first_row / kPanelRows, p.partial, unsigned(splits),
        p.batch * p.weight.rows, place,
        [&](int64_t at, float sum) { static_cast<T*>(p.y)[at] = from_float<T>(sum); });
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
