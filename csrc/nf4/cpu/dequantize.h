// Dequantization as the operators on CPU call it, for those that read a packed weight piece by piece.
#pragma once

#include "cpu/kernels.h"
#include "nf4/arguments.h"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {

WeightView view_of(const Packed& packed, int64_t columns);

// Whether there are tiles of a weight of this shape for gemm::multiply.
bool has_tiles(const CpuKernels& kernels, const WeightView& weight);

}  // namespace nf4
}  // namespace peftcore
