// The rows of a block. The host does not know how many rows an expert has: a launch has as many blocks as there can be
// tiles of rows, and each block finds its tile in the offsets.
#pragma once

#include "common/integers.h"
#include "grouped/cuda/grouped_cuda.h"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace grouped {
namespace {

using lora::kThreads, lora::kWarps;

constexpr int64_t kNone = -1, kWrong = -2;  // rows of no expert; offsets that do not increase

struct Rows {
    int64_t expert, first, last;
};

// An expert with rows has at most one tile that is not full.
inline int64_t most_tiles(const Groups& groups, int64_t tile_rows) {
    return least(groups.rows, groups.experts + 1) + groups.rows / tile_rows;
}

// Whether the offsets increase from 0 to the number of rows. All threads of a block call it, once.
__device__ __forceinline__ bool offsets_rise(const Groups& groups) {
    PEFTCORE_SHARED(uint32_t, falls, [kWarps]);
    bool fall = false;
    for (int64_t e = threadIdx.x; e <= groups.experts; e += kThreads) {
        const int64_t begin = e == 0 ? 0 : groups.offsets[e - 1];
        const int64_t end = e == groups.experts ? groups.rows : groups.offsets[e];
        fall |= begin > end;
    }
    const uint32_t lanes = __ballot_sync(0xffffffffu, fall);
    if (threadIdx.x % 32 == 0) falls[threadIdx.x / 32] = lanes;
    __syncthreads();
    uint32_t all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all |= falls[w];
    return all == 0;
}

// Rows of a tile, which belong to one expert, kNone or kWrong. Tiles are numbered through the experts, then through the
// rows without one; beyond them, `first` is not below `last`. All threads of a block call it, once.
template <int kTileRows>
__device__ Rows rows_of_tile(const Groups& groups, int64_t tile) {
    PEFTCORE_SHARED(int64_t, found, [3]);
    PEFTCORE_SHARED(int, sums, [2][kWarps]);
    const auto rows_of = [&](int64_t expert, int64_t begin, int64_t end, int64_t number) -> Rows {
        const int64_t first = begin + number * kTileRows;
        return {expert, first, least(first + kTileRows, end)};
    };
    if (!offsets_rise(groups)) return rows_of(kWrong, 0, groups.rows, tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t before = 0;  // tiles
    for (int64_t base = 0; base < groups.experts; base += kThreads) {
        const int64_t e = base + threadIdx.x;
        const bool inside = e < groups.experts;
        const int64_t begin = inside && e > 0 ? groups.offsets[e - 1] : 0;
        const int64_t end = inside ? groups.offsets[e] : begin;
        const int tiles = int(ceil_div(end - begin, kTileRows));
        int sum = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
            if (lane >= distance) sum += lower;
        }
        int* of_warps = sums[base / kThreads % 2];  // the other array may still be read
        if (lane == 31) of_warps[warp] = sum;
        __syncthreads();
        int64_t number = tile - before - (sum - tiles);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) number -= of_warps[w];
            before += of_warps[w];
        }
        if (number >= 0 && number < tiles) {
            const Rows rows = rows_of(e, begin, end, number);
            found[0] = rows.expert, found[1] = rows.first, found[2] = rows.last;
        }
    }
    if (tile >= before)
        return rows_of(kNone, groups.experts > 0 ? groups.offsets[groups.experts - 1] : 0, groups.rows,
                       tile - before);
    __syncthreads();
    return {found[0], found[1], found[2]};
}

// Fills columns [first, last) of rows without an expert: zero, or NaN for offsets that do not increase.
template <typename T>
__device__ void fill(const Rows& rows, T* out, int64_t columns, int64_t first, int64_t last) {
    const T value = from_float<T>(rows.expert == kNone ? 0.0f : bits_float(0x7fc00000u));
    if (rows.first >= rows.last || first >= last) return;
    const int64_t width = least(last, columns) - first, count = (rows.last - rows.first) * width;
    for (int64_t i = threadIdx.x; i < count; i += kThreads)
        out[(rows.first + i / width) * columns + first + i % width] = value;
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore
