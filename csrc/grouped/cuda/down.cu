// S and T of experts: a block takes rows of one expert and its factor (lora/cuda/down.cuh). Written for
// bandwidth and tested on the emulator; not measured on a GPU.
#include "common/cuda_dispatch.cuh"
#include "grouped/cuda/groups.cuh"
#include "lora/cuda/down.cuh"

namespace peftcore {
namespace grouped {
namespace {

template <typename T, int kRowTiles, int kRankTiles, bool kAcross>
__global__ void __launch_bounds__(kThreads) down_kernel(const Down p, int chunks) {
    const int chunk = int(blockIdx.x % unsigned(chunks)) * 8 * kRankTiles;
    const Rows rows = rows_of_tile<16 * kRowTiles>(p.groups, blockIdx.x / unsigned(chunks));
    if (rows.first >= rows.last) return;
    if (rows.expert < 0) return fill(rows, p.out, p.rank, chunk, least(chunk + 8 * kRankTiles, p.rank));
    lora::DownTile tile = {};
    tile.x = p.wide;
    tile.columns = tile.last_column = p.columns;
    tile.row = rows.first;
    tile.last_row = rows.last;
    tile.factor = p.factor + rows.expert * p.rank * p.columns;
    tile.rank = tile.stride = p.rank;
    tile.first_rank = chunk;
    tile.dropout = with_key(p.dropout);
    tile.scale = p.scale;
    tile.out = p.out;
    lora::down_tile<T, kRowTiles, kRankTiles, kAcross>(tile);
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

extern "C" const char* peftcore_grouped_down(const peftcore::grouped::Down* down, void* stream) {
    using namespace peftcore;
    if (down->groups.rows == 0 || down->rank == 0) return nullptr;
    const grouped::Groups& groups = down->groups;
    const int chunks = int(ceil_div(down->rank, lora::kRankChunk));
    const int row_tiles = groups.rows <= 16 * groups.experts ? 1 : 4;
    const int64_t blocks = grouped::most_tiles(groups, 16 * row_tiles) * chunks;
    return dispatch_dtype(down->dtype, [&](auto type) {
        return dispatch_flag(down->across, [&](auto flag) {
            return dispatch_size<1, 4>(row_tiles, [&](auto tiles_of_rows) {
                return dispatch_size<2, 8>(ceil_div(down->rank, 8), [&](auto tiles_of_ranks) {
                    using T = typename decltype(type)::type;
                    constexpr int kRowTiles = decltype(tiles_of_rows)::value;
                    constexpr int kRankTiles = decltype(tiles_of_ranks)::value;
                    constexpr bool kAcross = decltype(flag)::value;
                    return PEFTCORE_LAUNCH((grouped::down_kernel<T, kRowTiles, kRankTiles, kAcross>), blocks,
                                           grouped::kThreads, 0, stream, *down, chunks);
                });
            });
        });
    });
}
