#include "quant4/cpu/neonbf16.h"

#include "gemm/cpu/neon.h"
#include "gemm/cpu/region.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {
namespace quant4 {
namespace {

using gemm::kTileColumns;

constexpr int kRows = 4, kStep = 32;  // rows that are transposed together, values of each

// Wᵀ.
void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const int64_t step = values_of_scale(weight);
    for (int64_t row = 0; row < tiles * kTileColumns; row += kRows) {
        uint32_t* to = out + row / kTileColumns * stride + row % kTileColumns;
        int64_t begin[kRows];
        for (int r = 0; r < kRows; ++r)  // repeats the last row, for columns that are not stored
            begin[r] = least(column + row + r, weight.rows - 1) * weight.columns;
        ShortTable table[kRows];
        for (int64_t k = first; k < last; k += kStep, to += kStep / 2 * kTileColumns) {
            Decoded values[kRows];
            for (int r = 0; r < kRows; ++r) {
                if (k == first || k % step == 0) table[r] = scaled(weight, (begin[r] + k) >> weight.shift);
                values[r] = decoded(weight.codes + (begin[r] + k) / 2, table[r]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                gemm::transpose({values[0].of[i], values[1].of[i], values[2].of[i], values[3].of[i]}, 4,
                                to + 4 * i * kTileColumns);
        }
    }
}

// W: two rows at a time.
void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const int64_t step = values_of_scale(weight);
    for (int64_t n = first; n < last; n += 2, out += kTileColumns) {
        const int64_t begin = n * weight.columns + column, below = begin + weight.columns;
        const bool pair = n + 1 < last;
        ShortTable table, table_below;
        for (int tile = 0; tile < tiles; ++tile) {
            const int64_t at = begin + tile * kTileColumns, at_below = below + tile * kTileColumns;
            if (tile == 0 || at % step == 0) {
                table = scaled(weight, at >> weight.shift);
                if (pair) table_below = scaled(weight, at_below >> weight.shift);
            }
            const Decoded values = decoded(weight.codes + at / 2, table);
            const Decoded under = pair ? decoded(weight.codes + at_below / 2, table_below) : Decoded{};
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                gemm::store_pairs(values.of[i], under.of[i], out + tile * stride + 8 * i);
        }
    }
}

bool reads(const WeightView& weight) { return weight.shift >= 5 && has_tile_blocks(weight); }

}  // namespace

void fill_neonbf16(gemm::PackedReader& reader) {
    reader = {
        {.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = gemm::region_transposed},
         .plain = {.unpack = unpack_plain, .even_odd = false, .region = gemm::region_plain},
         .reads = reads}};
}

}  // namespace quant4
}  // namespace peftcore
