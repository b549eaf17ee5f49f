// AVX-512 with products of fp32.
#include "lora/cpu/avx512.h"

#include "lora/cpu/rows.h"

namespace peftcore {
namespace lora {

Kernels avx512_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kHalf:
            return Blocks<Single<Avx512, Half>>::kernels();
        case Dtype::kBFloat16:
            return Blocks<Single<Avx512, BFloat16>>::kernels();
        default:
            return Blocks<Single<Avx512, float>>::kernels();
    }
}

RowKernels avx512_row_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kHalf:
            return Rows<Single<Avx512, Half>>::kernels();
        case Dtype::kBFloat16:
            return Rows<Single<Avx512, BFloat16>>::kernels();
        default:
            return Rows<Single<Avx512, float>>::kernels();
    }
}

}  // namespace lora
}  // namespace peftcore
