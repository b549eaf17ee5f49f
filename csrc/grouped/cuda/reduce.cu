// dA and dB of experts: a block takes columns of one expert, whose rows it adds in their order
// (lora/cuda/reduce.cuh). An expert without rows gets zeros. Written for bandwidth and tested on the emulator;
// not measured on a GPU.
#include "common/cuda_dispatch.cuh"
#include "common/typed.cuh"
#include "grouped/cuda/groups.cuh"
#include "lora/cuda/reduce.cuh"

namespace peftcore {
namespace grouped {
namespace {

template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const Reduce p, int column_chunks, int rank_chunks) {
    const bool rise = offsets_rise(p.groups);
    const int64_t chunk = blockIdx.x / unsigned(rank_chunks), expert = chunk / column_chunks;
    lora::ReduceTile tile = {};
    tile.wide = p.wide;
    tile.thin = p.thin;
    tile.columns = p.columns;
    tile.rank = p.rank;
    tile.first_row = rise && expert > 0 ? p.groups.offsets[expert - 1] : 0;
    tile.last_row = rise ? p.groups.offsets[expert] : 0;
    tile.column = chunk % column_chunks * lora::kReduceColumns;
    tile.first_rank = int(blockIdx.x % unsigned(rank_chunks)) * 8 * kRankTiles;
    tile.dropout = with_key(p.dropout);
    const int64_t begin = expert * p.columns * p.rank;
    lora::reduce_tile<T, kRankTiles, false>(tile, [&](int64_t column, int rank, float sum) {
        const int64_t i = p.transposed ? rank * p.columns + column : column * p.rank + rank;
        store_at(p.out, p.out_dtype, begin + i, rise ? sum : bits_float(0x7fc00000u));
    });
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

extern "C" const char* peftcore_grouped_reduce(const peftcore::grouped::Reduce* reduce, void* stream) {
    using namespace peftcore;
    if (reduce->groups.experts == 0 || reduce->columns == 0 || reduce->rank == 0) return nullptr;
    return dispatch_dtype(reduce->dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int kMany = sizeof(T) == 2 ? 8 : 4;  // two stages of fp32 leave no space for more
        return dispatch_size<2, kMany>(ceil_div(reduce->rank, 8), [&](auto tiles) {
            constexpr int kRankTiles = decltype(tiles)::value;
            const int column_chunks = int(ceil_div(reduce->columns, lora::kReduceColumns));
            const int rank_chunks = int(ceil_div(reduce->rank, 8 * kRankTiles));
            const int64_t blocks = reduce->groups.experts * column_chunks * rank_chunks;
            return PEFTCORE_LAUNCH((grouped::reduce_kernel<T, kRankTiles>), blocks, grouped::kThreads, 0,
                                   stream, *reduce, column_chunks, rank_chunks);
        });
    });
}
