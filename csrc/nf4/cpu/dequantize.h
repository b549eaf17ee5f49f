// Dequantization as the operators on CPU call it, for those that read a packed weight piece by piece.
#pragma once

#include "nf4/arguments.h"
#include "nf4/cpu/kernels.h"
#include "nf4/cpu/tiles/tiles.h"

namespace peftcore {
namespace nf4 {

// The kernels of the SIMD level in use.
Kernels kernels();

Scales scales_of(const Packed& packed);

// W [rows, columns] for gemm::multiply, or none where this processor or these shapes have no tiles of it.
std::optional<PackedTiles> tiles_of(const Packed& packed, int64_t columns);

}  // namespace nf4
}  // namespace peftcore
