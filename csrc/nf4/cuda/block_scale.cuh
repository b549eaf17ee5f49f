// A weight's codebooks in shared memory, and the scale of a block as the CPU kernels have it, bit for bit.
#pragma once

#include "common/cuda_launch.cuh"
#include "weight/view.h"

namespace peftcore {
namespace nf4 {
namespace {

// By all threads of a block, which then wait for each other. Returns nested_offset.
template <bool kNested>
__device__ __forceinline__ float load_codebooks(const WeightView& weight, float* quant_map,
                                                float* nested_quant_map) {
    if (threadIdx.x < 16) quant_map[threadIdx.x] = weight.quant_map[threadIdx.x];
    if constexpr (kNested) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) nested_quant_map[i] = weight.nested_quant_map[i];
        return *weight.nested_offset;
    }
    return 0;
}

template <bool kNested>
__device__ __forceinline__ float block_scale(const WeightView& weight, const float* nested_quant_map,
                                             float nested_offset, int64_t block) {
    if constexpr (kNested) {
        const uint8_t code = static_cast<const uint8_t*>(weight.absmax)[block];
        const float outer = weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift];
        // Rounded twice, not fused.
        return __fadd_rn(__fmul_rn(nested_quant_map[code], outer), nested_offset);
    } else {
        return static_cast<const float*>(weight.absmax)[block];
    }
}

}  // namespace
}  // namespace nf4
}  // namespace peftcore
