// A packed weight W [rows, columns] as the right side of gemm::multiply, each value rounded once to bf16.
#pragma once

#include "gemm/cpu/product.h"
#include "nf4/nf4.h"

namespace peftcore {
namespace nf4 {

struct PackedTiles {
    const uint8_t* packed;
    Scales scales;
    float code[16];
    int shift;  // log2 of the block size
    int64_t rows, columns;
};

// Columns must be a multiple of this, and a block of values one too.
constexpr int64_t kTileBlock = 64;

gemm::Tiles transposed(const PackedTiles& weight);  // Wᵀ, for x Wᵀ
gemm::Tiles plain(const PackedTiles& weight);       // W, for dy W

}  // namespace nf4
}  // namespace peftcore
