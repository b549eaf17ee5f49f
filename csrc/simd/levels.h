// The loops of each level over vectors of fp32 (loops.h), compiled in the file named after the level.
#pragma once

namespace peftcore {

struct CpuKernels;

namespace simd {

void fill_portable(CpuKernels&);
void fill_avx2(CpuKernels&);
void fill_avx512(CpuKernels&);
void fill_neon(CpuKernels&);

}  // namespace simd
}  // namespace peftcore
