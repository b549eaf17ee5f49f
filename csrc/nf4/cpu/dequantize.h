// Dequantization as the operators on CPU call it, for those that read a weight piece by piece.
#pragma once

#include "cpu/kernels.h"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {

// Whether there are tiles of a weight of this shape for gemm::multiply.
bool has_tiles(const CpuKernels& kernels, const WeightView& weight);

}  // namespace nf4
}  // namespace peftcore
