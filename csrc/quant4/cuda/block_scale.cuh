// A weight's codebooks in shared memory, and scales and values bit for bit as in the CPU kernels.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/half.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// Loads the codebooks and synchronizes; all threads of a block call it. Returns nested_offset.
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

// A block's scale as it is stored, so that it can be loaded ahead of its use.
struct StoredScale {
    float outer;  // or the scale
    uint8_t code;
};

template <bool kNested>
__device__ __forceinline__ StoredScale stored_scale(const WeightView& weight, int64_t block) {
    if constexpr (kNested)
        return {weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift],
                static_cast<const uint8_t*>(weight.absmax)[block]};
    else
        return {static_cast<const float*>(weight.absmax)[block], 0};
}

template <bool kNested>
__device__ __forceinline__ float scale_of(const StoredScale& stored, const float* nested_quant_map,
                                          float nested_offset) {
    // Rounded twice, not fused.
    if constexpr (kNested)
        return __fadd_rn(__fmul_rn(nested_quant_map[stored.code], stored.outer), nested_offset);
    else
        return stored.outer;
}

template <bool kNested>
__device__ __forceinline__ float block_scale(const WeightView& weight, const float* nested_quant_map,
                                             float nested_offset, int64_t block) {
    return scale_of<kNested>(stored_scale<kNested>(weight, block), nested_quant_map, nested_offset);
}

// The two values of a byte, rounded to 16 bits, the even one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t value_pair(const float* quant_map, uint32_t byte, float scale) {
    return pair_bits<T>(quant_map[byte >> 4 & 15] * scale, quant_map[byte & 15] * scale);
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
