// out = bias + keep ∘ (thin Fᵀ), or added to out (up.cuh): T A with the dropout of x, and S Bᵀ, with per-sample adapters,
// too. Written for bandwidth and tested on the emulator; not measured on a GPU.
#include "common/cuda_dispatch.cuh"
#include "lora/cuda/up.cuh"

namespace peftcore {
namespace lora {
namespace {

struct UpParams {
    const float* thin;
    int64_t rows, columns;  // of a sample's out
    const int64_t* index;
    Adapters adapters;
    int stride;  // of thin
    int64_t column_tiles;
    Dropout dropout;
    const void* bias;
    bool add;
    void* out;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) up_kernel(const UpParams p) {
    const int64_t row_tiles = (p.rows + kTileSide - 1) / kTileSide;
    const int64_t number = blockIdx.x / p.column_tiles, sample = number / row_tiles;
    const int64_t global_index = p.index != nullptr ? p.index[sample] : 0;
    const bool missing =
        global_index < -1 || global_index >= p.adapters.total;  // no such adapter: NaN, to be noticed
    const int64_t adapter = global_index - p.adapters.first;
    if (missing ? p.adapters.first != 0 : adapter < 0 || adapter >= p.adapters.count) return;
    UpTile tile = {};
    tile.row = sample * p.rows + number % row_tiles * kTileSide;
    tile.last_row = (sample + 1) * p.rows;
    tile.column = blockIdx.x % p.column_tiles * kTileSide;
    tile.columns = p.columns;
    tile.thin = p.thin;
    tile.stride = p.stride;
    tile.factor = missing ? nullptr : p.adapters.factor[adapter];
    tile.rank = missing ? 0 : p.adapters.rank[adapter];
    tile.missing = missing;
    tile.dropout = p.dropout;
    tile.bias = p.bias;
    tile.add = p.add;
    tile.out = p.out;
    up_tile<T>(tile);
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_up(const float* thin, const peftcore::lora::Factors* factors,
                                        const peftcore::Dropout* dropout, const void* bias, bool add,
                                        const peftcore::lora::Wide* out, void* stream) {
    using namespace peftcore::lora;
    if (out->samples == 0 || out->rows == 0 || out->columns == 0) return nullptr;
    if (out->dtype == Dtype::kFloat) return "out must have 16 bits";
    UpParams p = {};
    p.thin = thin;
    p.rows = out->rows;
    p.columns = out->columns;
    p.index = factors->index;
    p.stride = factors->stride;
    p.column_tiles = (p.columns + kTileSide - 1) / kTileSide;
    p.dropout = *dropout;
    p.bias = bias;
    p.add = add;
    p.out = out->values;
    const int64_t blocks = out->samples * ((p.rows + kTileSide - 1) / kTileSide) * p.column_tiles;
    for (int first = 0; first == 0 || first < factors->count; first += kMaxAdapters) {
        p.adapters = adapters_from(first, *factors);
        const char* error = peftcore::dispatch_16_bits(out->dtype, [&](auto type) {
            return PEFTCORE_LAUNCH(up_kernel<typename decltype(type)::type>, blocks, kThreads, 0, stream, p);
        });
        if (error != nullptr) return error;
    }
    return nullptr;
}
