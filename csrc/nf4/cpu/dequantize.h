// Dequantization as the operators on CPU call it, for those that read a packed weight piece by piece.
#pragma once

#include "nf4/arguments.h"
#include "nf4/cpu/kernels.h"
#include "nf4/cpu/tiles/tiles.h"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {

// The kernels of the SIMD level in use.
Kernels kernels();

WeightView view_of(const Packed& packed, int64_t columns);

// Whether this processor has tiles of a weight of this shape for gemm::multiply.
bool has_tiles(const WeightView& weight);

}  // namespace nf4
}  // namespace peftcore
