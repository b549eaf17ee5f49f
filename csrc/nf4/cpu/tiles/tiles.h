// A packed weight W [rows, columns] as the right side of gemm::multiply, each value rounded once to bf16.
#pragma once

#include "gemm/cpu/product.h"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {

// Columns must be a multiple of this, and a block of values one too.
constexpr int64_t kTileBlock = 64;

// A packed WeightView as the right side of a product: Wᵀ for x Wᵀ, W for dy W. Tiles refer to the view.
struct PackedReader {
    gemm::Tiles transposed, plain;
};

void fill_avx512bf16(PackedReader&);
void fill_neonbf16(PackedReader&);

}  // namespace nf4
}  // namespace peftcore
