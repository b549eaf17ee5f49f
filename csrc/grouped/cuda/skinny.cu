// The product of few rows per expert, as in generation, with a weight in 4 bits stored as [columns, inner]: a block
// takes 8 or 16 rows of one expert and 16 columns, directly from 4 bits (quant4/cuda/rows.cuh).
#include "common/cuda_dispatch.cuh"
#include "grouped/cuda/groups.cuh"
#include "quant4/cuda/rows.cuh"

namespace peftcore {
namespace grouped {
namespace {

static_assert(quant4::kThreads == kThreads, "");

template <typename T, int kTiles, typename Scales>
__global__ void __launch_bounds__(kThreads) skinny_kernel(const Skinny p, unsigned column_tiles) {
    const int64_t column = int64_t(blockIdx.x % column_tiles) * quant4::kRows;
    const Rows rows = rows_of_tile<8 * kTiles>(p.groups, blockIdx.x / column_tiles);
    T* out = static_cast<T*>(p.out);
    if (rows.first >= rows.last) return;
    if (rows.expert < 0) return fill(rows, out, p.columns, column, column + quant4::kRows);
    quant4::LinearLaunch linear = {};
    linear.weight = expert_of(p.weight, rows.expert, p.groups.experts);
    linear.batch = int(rows.last - rows.first);
    linear.x = static_cast<const T*>(p.wide) + rows.first * p.inner;
    if (p.bias != nullptr) linear.bias = static_cast<const T*>(p.bias) + rows.expert * p.columns;
    linear.rank = p.rank;
    if (p.rank > 0) {
        linear.thin = p.thin + rows.first * p.rank;
        linear.factor = p.factor + rows.expert * p.columns * p.rank;
    }
    linear.y = out + rows.first * p.columns;
    quant4::rows_tile<T, 1, kTiles, Scales>(linear, column, quant4::ReadyBranch{linear});
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

extern "C" bool peftcore_grouped_is_skinny(const peftcore::grouped::Skinny* p) {
    return p->dtype != peftcore::Dtype::kFloat && p->weight.quant_map != nullptr &&
           p->groups.rows <= 16 * p->groups.experts && peftcore::quant4::in_pieces(p->wide, p->weight) &&
           peftcore::quant4::in_lanes(p->weight);
}

extern "C" const char* peftcore_grouped_skinny(const peftcore::grouped::Skinny* product, void* stream) {
    using namespace peftcore;
    const grouped::Skinny& p = *product;
    if (p.groups.rows == 0 || p.columns == 0) return nullptr;
    const int tiles = p.groups.rows <= 8 * p.groups.experts ? 1 : 2;
    const int64_t column_tiles = ceil_div(p.columns, quant4::kRows);
    const int64_t blocks = grouped::most_tiles(p.groups, 8 * tiles) * column_tiles;
    return dispatch_16_bits(p.dtype, [&](auto type) {
        return dispatch_size<1, 2>(tiles, [&](auto size) {
            using T = typename decltype(type)::type;
            constexpr int kTiles = decltype(size)::value;
            return quant4::dispatch_lane_scales(p.weight, [&](auto scales) {
                using Scales = typename decltype(scales)::type;
                return PEFTCORE_LAUNCH((grouped::skinny_kernel<T, kTiles, Scales>), blocks, grouped::kThreads,
                                       0, stream, p, unsigned(column_tiles));
            });
        });
    });
}
