// What AVX-512 with dot products of bf16 supplies to `multiply`. x is arranged by chunks of kPairs pairs, by
// blocks of kRows rows (the last may have fewer), as [pairs][rows of the block].
#pragma once

#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {

// Rows [first, last) of x; `first` is a multiple of kRows.
void arrange(const Product& product, int64_t first, int64_t last, uint32_t* out);

// Tiles of 32 columns [first_tile, last_tile) of rows [first_row, last_row), which is a multiple of kRows.
// `panel` holds kTiles * min(kPairs, all pairs) * kTileColumns words, `sums` a panel's columns of these rows
// if pairs fill more than one chunk.
void multiply_tiles(const Product& product, const uint32_t* x, int64_t first_tile, int64_t last_tile,
                    int64_t first_row, int64_t last_row, uint32_t* panel, float* sums);

}  // namespace gemm
}  // namespace peftcore
