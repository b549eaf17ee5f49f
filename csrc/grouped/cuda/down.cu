// S and T of experts: a block takes rows of one expert and its factor (lora/cuda/down.cuh). Written for
// bandwidth and tested on the emulator; not measured on a GPU.
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
    tile.dropout = p.dropout;
    tile.scale = p.scale;
    tile.out = p.out;
    lora::down_tile<T, kRowTiles, kRankTiles, kAcross>(tile);
}

template <typename T, int kRowTiles, bool kAcross>
const char* launch(const Down& p, void* stream) {
    const int chunks = int(ceil_div(p.rank, lora::kRankChunk));
    const int64_t blocks = most_tiles(p.groups, 16 * kRowTiles) * chunks;
    if (blocks > INT32_MAX) return "too many rows for one launch";
    const unsigned grid = unsigned(blocks);
    if (p.rank <= 16)
        return PEFTCORE_LAUNCH((down_kernel<T, kRowTiles, 2, kAcross>), grid, kThreads, 0, stream, p, chunks);
    return PEFTCORE_LAUNCH((down_kernel<T, kRowTiles, 8, kAcross>), grid, kThreads, 0, stream, p, chunks);
}

template <typename T>
const char* launch(const Down& p, void* stream) {
    const bool few = p.groups.rows <= 16 * p.groups.experts;
    if (p.across) return few ? launch<T, 1, true>(p, stream) : launch<T, 4, true>(p, stream);
    return few ? launch<T, 1, false>(p, stream) : launch<T, 4, false>(p, stream);
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

extern "C" const char* peftcore_grouped_down(const peftcore::grouped::Down* down, void* stream) {
    using namespace peftcore;
    if (down->groups.rows == 0 || down->rank == 0) return nullptr;
    switch (down->dtype) {
        case Dtype::kFloat:
            return grouped::launch<float>(*down, stream);
        case Dtype::kHalf:
            return grouped::launch<Half>(*down, stream);
        case Dtype::kBFloat16:
            return grouped::launch<BFloat16>(*down, stream);
    }
    return "unknown dtype";
}
