// Dequantization as the operators on CPU call it, for those that read a packed weight piece by piece.
#pragma once

#include "nf4/arguments.h"
#include "nf4/cpu/kernels.h"

namespace peftcore {
namespace nf4 {

// The kernels of the SIMD level in use.
Kernels kernels();

Scales scales_of(const Packed& packed);

}  // namespace nf4
}  // namespace peftcore
