// Adds to the product of experts what the library's leaves out: out += bias + keep ∘ (thin Fᵀ), S Bᵀ or T A of each
// row's expert (lora/cuda/up.cuh). Rows without an expert become zero. Written for bandwidth and tested on the emulator;
// not measured on a GPU.
#include "common/cuda_dispatch.cuh"
#include "grouped/cuda/groups.cuh"
#include "lora/cuda/up.cuh"

namespace peftcore {
namespace grouped {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) up_kernel(const Up p, unsigned column_tiles) {
    const int64_t column = int64_t(blockIdx.x % column_tiles) * lora::kTileSide;
    const Rows rows = rows_of_tile<lora::kTileSide>(p.groups, blockIdx.x / column_tiles);
    if (rows.first >= rows.last) return;
    if (rows.expert < 0)
        return fill(rows, static_cast<T*>(p.out), p.columns, column, column + lora::kTileSide);
    if (p.rank == 0 && p.bias == nullptr) return;
    lora::UpTile tile = {};
    tile.row = rows.first;
    tile.last_row = rows.last;
    tile.column = column;
    tile.columns = p.columns;
    tile.thin = p.thin;
    tile.factor = p.factor + rows.expert * p.columns * p.rank;
    tile.rank = tile.stride = p.rank;
    tile.dropout = p.dropout;
    if (p.bias != nullptr) tile.bias = static_cast<const T*>(p.bias) + rows.expert * p.columns;
    tile.add = true;
    tile.out = p.out;
    lora::up_tile<T>(tile);
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

extern "C" const char* peftcore_grouped_up(const peftcore::grouped::Up* up, void* stream) {
    using namespace peftcore;
    if (up->groups.rows == 0 || up->columns == 0) return nullptr;
    const int64_t column_tiles = ceil_div(up->columns, lora::kTileSide);
    const int64_t blocks = grouped::most_tiles(up->groups, lora::kTileSide) * column_tiles;
    return dispatch_dtype(up->dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH((grouped::up_kernel<T>), blocks, grouped::kThreads, 0, stream, *up,
                               unsigned(column_tiles));
    });
}
