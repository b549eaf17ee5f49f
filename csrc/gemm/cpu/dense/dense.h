// A matrix W [rows, columns] of bf16 as the right side of gemm::multiply.
#pragma once

#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {

struct Dense {
    const BFloat16* values;
    int64_t rows, columns;
};

Tiles transposed(const Dense& weight);  // Wᵀ, for x Wᵀ
Tiles plain(const Dense& weight);       // W, for dy W

}  // namespace gemm
}  // namespace peftcore
