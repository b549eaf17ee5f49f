// A packed weight W [rows, columns] as the right side of gemm::multiply, each value rounded once to bf16.
#pragma once

#include "gemm/cpu/product.h"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {

// Columns must be a multiple of this, and a block of values one too.
constexpr int64_t kTileBlock = 64;

// They refer to the weight, which must outlive them.
gemm::Tiles transposed(const WeightView& weight);  // Wᵀ, for x Wᵀ
gemm::Tiles plain(const WeightView& weight);       // W, for dy W

}  // namespace nf4
}  // namespace peftcore
