// AVX-512 with products of fp32.
#include "simd/avx512.h"

#include "simd/loops.h"

namespace peftcore {
namespace simd {

void fill_avx512(CpuKernels& table) { fill_loops<Avx512>(table); }

}  // namespace simd
}  // namespace peftcore
