// s = c (keep ∘ x) Aᵀ in one kernel, which reads x from memory once. Written for bandwidth and tested on the emulator;
// not measured on a GPU.
//
// Blocks for the same rows and different ranks (down.cuh) have consecutive indices, so that they find x in L2. Few rows
// give few blocks: columns are then divided among blocks, too, and the last block adds their sums in order. For up to 8
// rows, as in generation, a block has one rank instead, and there are no partial sums.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_tickets.cuh"
#include "common/cuda_tickets.h"
#include "common/integers.h"
#include "lora/cuda/down.cuh"
#include "lora/cuda/rank_dot.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kSmallRows = 256;         // up to here, 16 rows a block
constexpr int64_t kSplitColumns = 512;  // least columns of a split

struct DownParams {
    const void* x;
    int64_t rows, columns;  // of a sample
    const int64_t* index;
    Adapters adapters;
    int stride;  // of s
    int chunks;  // of ranks
    Dropout dropout;
    int64_t split_columns;
    int64_t all_rows;
    float* partial;     // [splits, all_rows, stride], or nullptr: s is written
    unsigned* tickets;  // one per block of rows and ranks; nullptr: another launch adds
    float* s;
};

template <typename T, int kRowTiles, int kRankTiles>
__global__ void __launch_bounds__(kThreads) down_kernel(const DownParams p) {
    constexpr int kRows = 16 * kRowTiles;
    const int64_t row_tiles = (p.rows + kRows - 1) / kRows;
    const int64_t number = blockIdx.x / p.chunks, sample = number / row_tiles;
    const int64_t adapter = (p.index != nullptr ? p.index[sample] : 0) - p.adapters.first;
    if (adapter < 0 || adapter >= p.adapters.count) return;
    DownTile tile = {};
    tile.x = p.x;
    tile.columns = p.columns;
    tile.row = sample * p.rows + number % row_tiles * kRows;
    tile.last_row = (sample + 1) * p.rows;
    tile.first_column = int64_t(blockIdx.y) * p.split_columns;
    tile.last_column = least(tile.first_column + p.split_columns, p.columns);
    tile.factor = p.adapters.factor[adapter];
    tile.rank = p.adapters.rank[adapter];
    tile.first_rank = int(blockIdx.x % p.chunks) * 8 * kRankTiles;
    tile.dropout = with_key(p.dropout);
    tile.scale = p.partial != nullptr ? 1 : p.adapters.scale[adapter];
    tile.out = p.partial != nullptr ? p.partial + blockIdx.y * p.all_rows * p.stride : p.s;
    tile.stride = p.stride;
    down_tile<T, kRowTiles, kRankTiles>(tile);
    constexpr int kRanks = 8 * kRankTiles;
    const auto place = [&](int i) -> SumPlace {
        const int64_t m = tile.row + i / kRanks;
        const int j = tile.first_rank + i % kRanks;
        return {m < tile.last_row && j < tile.rank, m * p.stride + j};
    };
    add_by_last<kThreads, kRows * kRanks, 2>(
        p.tickets == nullptr ? nullptr : p.tickets + blockIdx.x, p.partial, gridDim.y, p.all_rows * p.stride,
        place, [&](int64_t at, float sum) { p.s[at] = p.adapters.scale[adapter] * sum; });
}

// A block takes at most kRankDotRows rows of a sample and one rank.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) rank_dot_kernel(const DownParams p) {
    const int64_t sample = blockIdx.x / p.stride;
    const int rank = int(blockIdx.x % p.stride);
    const int64_t adapter = (p.index != nullptr ? p.index[sample] : 0) - p.adapters.first;
    if (adapter < 0 || adapter >= p.adapters.count || rank >= p.adapters.rank[adapter]) return;
    RankDot dot = {};
    dot.row = sample * p.rows;
    dot.x = static_cast<const T*>(p.x) + dot.row * p.columns;
    dot.rows = int(p.rows);
    dot.columns = p.columns;
    dot.factor = p.adapters.factor[adapter] + rank * p.columns;
    dot.dropout = with_key(p.dropout);
    dot.scale = p.adapters.scale[adapter];
    dot.out = p.s + dot.row * p.stride + rank;
    dot.stride = p.stride;
    rank_dot<T>(dot);
}

// Chosen by the shape only, so that results are the same on every GPU.
struct Plan {
    int row_tiles, chunks;
    int64_t row_blocks;
    Parts splits;  // of the columns
};

Plan plan_of(int64_t samples, int64_t rows, int64_t columns, int rank, bool split) {
    Plan plan;
    plan.row_tiles = rows <= kSmallRows ? 1 : 4;
    plan.row_blocks = samples * ((rows + 16 * plan.row_tiles - 1) / (16 * plan.row_tiles));
    plan.chunks = (rank + kRankChunk - 1) / kRankChunk;
    const int64_t blocks = plan.row_blocks * plan.chunks;
    const int64_t target_splits = split && rows > kRankDotRows ? cuda_tuning().down_blocks / blocks : 1;
    plan.splits = parts_of(columns, 64, target_splits, columns / kSplitColumns);
    return plan;
}

// Launches the kernel for one launch's adapters.
const char* launch_down(const DownParams& p, const Plan& plan, Dtype dtype, void* stream) {
    return dispatch_16_bits(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (p.rows <= kRankDotRows)
            return PEFTCORE_LAUNCH(rank_dot_kernel<T>, p.all_rows / p.rows * p.stride, kThreads, 0, stream,
                                   p);
        const Grid grid(plan.row_blocks * plan.chunks, plan.splits.count);
        return dispatch_size<1, 4>(plan.row_tiles, [&](auto row_tiles) {
            return dispatch_size<2, 8>(ceil_div(p.stride, 8), [&](auto rank_tiles) {
                constexpr int kRowTiles = decltype(row_tiles)::value,
                              kRankTiles = decltype(rank_tiles)::value;
                return PEFTCORE_LAUNCH((down_kernel<T, kRowTiles, kRankTiles>), grid, kThreads, 0, stream, p);
            });
        });
    });
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" int64_t peftcore_lora_down_workspace(int64_t rows, int64_t columns, int rank) {
    using namespace peftcore::lora;
    if (rows == 0 || rank == 0) return 0;
    const Plan plan = plan_of(1, rows, columns, rank, true);
    return plan.splits.count == 1 ? 0 : plan.splits.count * rows * rank;
}

extern "C" const char* peftcore_lora_down(const peftcore::lora::Wide* x,
                                          const peftcore::lora::Factors* factors,
                                          const peftcore::Dropout* dropout, float* partial, float* s,
                                          void* stream) {
    using namespace peftcore::lora;
    const int stride = factors->stride;
    if (x->samples == 0 || x->rows == 0 || stride == 0) return nullptr;
    if (x->dtype == Dtype::kFloat) return "x must have 16 bits";
    const Plan plan = plan_of(x->samples, x->rows, x->columns, stride, factors->index == nullptr);
    DownParams p = {};
    p.x = x->values;
    p.rows = x->rows;
    p.columns = x->columns;
    p.index = factors->index;
    p.stride = stride;
    p.chunks = plan.chunks;
    p.dropout = *dropout;
    p.split_columns = plan.splits.size;
    p.all_rows = x->samples * x->rows;
    p.partial = plan.splits.count > 1 ? partial : nullptr;
    p.tickets =
        plan.splits.count > 1 ? peftcore_tickets(int(plan.row_blocks * plan.chunks), stream) : nullptr;
    p.s = s;
    for (int first = 0; first < factors->count; first += kMaxAdapters) {
        p.adapters = adapters_from(first, *factors);
        if (const char* error = launch_down(p, plan, x->dtype, stream)) return error;
    }
    if (p.partial == nullptr || p.tickets != nullptr) return nullptr;
    return peftcore_sum(partial, plan.splits.count, p.all_rows * stride, factors->scales[0], s,
                        int(Dtype::kFloat), stream);
}
