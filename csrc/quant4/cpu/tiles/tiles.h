// A packed weight W [rows, columns] as the right side of gemm::multiply: each value rounded once to bf16 where words
// are pairs of it, else in fp32.
#pragma once

#include "gemm/cpu/kernels.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {

// Columns must be a multiple of this for the readers.
constexpr int64_t kTileBlock = 64;

static inline bool has_tile_blocks(const WeightView& weight) { return weight.columns % kTileBlock == 0; }

// Values of a row that are unpacked with one scale.
static inline int64_t values_of_scale(const WeightView& weight) {
    return int64_t(1) << weight.shift < kTileBlock ? int64_t(1) << weight.shift : kTileBlock;
}

void fill_avx2(gemm::ManyRows (&)[kDtypes]);  // the readers of weights in 4 bits, for fp16 and bf16
void fill_avx512bf16(gemm::PackedReader&);
void fill_neonbf16(gemm::PackedReader&);

}  // namespace quant4
}  // namespace peftcore
