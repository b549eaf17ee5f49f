// R = (keep ∘ W)ᵀ V, the sums over rows of a gradient: dA from x and T, dB from dy and S; and in the same pass P = c W
// Fᵀ: T from dy and B. Written for bandwidth and tested on the emulator; not measured on a GPU.
//
// A block takes 128 columns of W and a part of its rows (reduce.cuh). Parts, a fixed split of the rows, are added in
// order by the last block, so every run gives the same bits. P needs all columns: blocks leave more partial
// products than one block could add; another launch adds them, and R's parts with them.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_tickets.cuh"
#include "common/cuda_tickets.h"
#include "common/integers.h"
#include "common/typed.cuh"
#include "lora/cuda/reduce.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kRowsOfPart = 8 * kReduceRows;  // at least, as partial sums are written and read again

struct ReduceParams {
    const void* wide;
    const float *thin, *factor;
    int64_t rows, columns;
    int rank, chunks;
    int64_t part_rows;
    int64_t column_step, rank_step;  // of partial sums
    Dropout dropout;
    float *partial, *product;  // [parts, columns * rank], [columns / kReduceColumns, rows, rank]
    unsigned* tickets;         // one per columns and ranks; nullptr: another launch adds
    void* out;
    Dtype out_dtype;
};

template <typename T, int kRankTiles, bool kProduct>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceParams p) {
    const int64_t chunk = blockIdx.x / p.chunks;
    ReduceTile tile = {};
    tile.wide = p.wide;
    tile.thin = p.thin;
    tile.columns = p.columns;
    tile.rank = p.rank;
    tile.first_row = int64_t(blockIdx.y) * p.part_rows;
    tile.last_row = least(tile.first_row + p.part_rows, p.rows);
    tile.column = chunk * kReduceColumns;
    tile.first_rank = int(blockIdx.x % p.chunks) * 8 * kRankTiles;
    tile.dropout = with_key(p.dropout);
    if (kProduct) {
        tile.factor = p.factor;
        tile.product = p.product + chunk * p.rows * p.rank;
    }
    float* partial = p.partial + blockIdx.y * p.columns * p.rank;
    reduce_tile<T, kRankTiles, kProduct>(tile, [&](int64_t column, int rank, float sum) {
        partial[column * p.column_step + rank * p.rank_step] = sum;
    });
    if constexpr (!kProduct) {
        constexpr int kRanks = 8 * kRankTiles;
        const auto place = [&](int i) -> SumPlace {
            const bool ranks_first = p.rank_step == 1;  // in memory order
            const int64_t column = tile.column + (ranks_first ? i / kRanks : i % kReduceColumns);
            const int rank = tile.first_rank + (ranks_first ? i % kRanks : i / kReduceColumns);
            return {column < p.columns && rank < p.rank, column * p.column_step + rank * p.rank_step};
        };
        add_by_last<kThreads, kReduceColumns * kRanks, 8>(
            p.tickets == nullptr ? nullptr : p.tickets + blockIdx.x, p.partial, gridDim.y, p.columns * p.rank,
            place, [&](int64_t at, float sum) { store_at(p.out, p.out_dtype, at, sum); });
    }
}

// Chosen by the shape only, so that results are the same on every GPU.
struct Plan {
    int64_t column_chunks, rank_chunks;
    Parts parts;  // of the rows
};

Plan plan_of(int64_t rows, int64_t columns, int rank) {
    Plan plan;
    plan.column_chunks = (columns + kReduceColumns - 1) / kReduceColumns;
    plan.rank_chunks = (rank + kRankChunk - 1) / kRankChunk;
    const int64_t blocks = plan.column_chunks * plan.rank_chunks;
    const int64_t target_parts = ceil_div(cuda_tuning().reduce_blocks, blocks);
    plan.parts = parts_of(rows, kReduceRows, target_parts, ceil_div(rows, kRowsOfPart));
    return plan;
}

const char* launch_reduce(const ReduceParams& p, const Plan& plan, Dtype dtype, void* stream) {
    const Grid grid(plan.column_chunks * plan.rank_chunks, plan.parts.count);
    return dispatch_16_bits(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (p.product != nullptr)
            return PEFTCORE_LAUNCH((reduce_kernel<T, 2, true>), grid, kThreads, 0, stream, p);
        return dispatch_size<2, 8>(ceil_div(p.rank, 8), [&](auto rank_tiles) {
            constexpr int kRankTiles = decltype(rank_tiles)::value;
            return PEFTCORE_LAUNCH((reduce_kernel<T, kRankTiles, false>), grid, kThreads, 0, stream, p);
        });
    });
}

// Leaves partial sums, unless there are tickets; `sum` adds them.
const char* reduce(ReduceParams& p, Dtype dtype, void* out, bool transposed, Sum& sum, void* stream) {
    const Plan plan = plan_of(p.rows, p.columns, p.rank);
    if (p.product == nullptr)
        p.tickets = peftcore_tickets(int(least(plan.column_chunks * plan.rank_chunks, INT32_MAX)), stream);
    p.out = out;
    p.chunks = int(plan.rank_chunks);
    p.part_rows = plan.parts.size;
    p.column_step = transposed ? 1 : p.rank;
    p.rank_step = transposed ? p.columns : 1;
    sum = {p.partial, plan.parts.count, p.columns * p.rank, 1, out};
    return launch_reduce(p, plan, dtype, stream);
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" int64_t peftcore_lora_reduce_workspace(int64_t rows, int64_t columns, int rank) {
    if (rows == 0 || columns == 0 || rank == 0) return 0;
    return peftcore::lora::plan_of(rows, columns, rank).parts.count * columns * rank;
}

extern "C" int64_t peftcore_lora_product_workspace(int64_t rows, int64_t columns, int rank) {
    using namespace peftcore::lora;
    return (columns + kReduceColumns - 1) / kReduceColumns * rows * rank;
}

extern "C" const char* peftcore_lora_reduce(const peftcore::lora::Wide* wide, const float* thin, int rank,
                                            const peftcore::Dropout* dropout, float* partial, void* out,
                                            int out_dtype, bool transposed, void* stream) {
    using namespace peftcore::lora;
    if (wide->columns == 0 || rank == 0) return nullptr;
    if (wide->rows == 0) return peftcore_sum(partial, 0, wide->columns * rank, 1, out, out_dtype, stream);
    ReduceParams p = {};
    p.wide = wide->values;
    p.thin = thin;
    p.rows = wide->rows;
    p.columns = wide->columns;
    p.rank = rank;
    p.dropout = *dropout;
    p.partial = partial;
    p.out_dtype = Dtype(out_dtype);
    Sum sum;
    const char* error = reduce(p, wide->dtype, out, transposed, sum, stream);
    if (error != nullptr || p.tickets != nullptr) return error;
    return peftcore_sum(sum.partial, sum.parts, sum.count, sum.scale, sum.out, out_dtype, stream);
}

extern "C" const char* peftcore_lora_reduce_and_product(const peftcore::lora::Wide* wide, const float* thin,
                                                        const float* factor, int rank, float scale,
                                                        float* partial, float* product_partial, void* out,
                                                        int out_dtype, float* product, void* stream) {
    using namespace peftcore::lora;
    const int64_t rows = wide->rows, columns = wide->columns;
    if (rank > kOnePassMaxRank) return "more ranks than one pass takes";
    if (rows == 0 || columns == 0 || rank == 0) {  // sums of nothing
        const char* error = peftcore_sum(partial, 0, columns * rank, 1, out, out_dtype, stream);
        return error ? error : peftcore_sum(partial, 0, rows * rank, 1, product, int(Dtype::kFloat), stream);
    }
    ReduceParams p = {};
    p.wide = wide->values;
    p.thin = thin;
    p.factor = factor;
    p.rows = rows;
    p.columns = columns;
    p.rank = rank;
    p.partial = partial;
    p.product = product_partial;
    Sum sum;
    const char* error = reduce(p, wide->dtype, out, false, sum, stream);
    if (error != nullptr) return error;
    const int64_t chunks = (columns + kReduceColumns - 1) / kReduceColumns;
    const Sum products = {product_partial, chunks, rows * rank, scale, product};
    return peftcore_lora_sum_pair(&sum, out_dtype, &products, stream);
}
