// A weight's codebooks in shared memory, and scales and values bit for bit as in the CPU kernels.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/half.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// Loads the codebooks and synchronizes; all threads of a block call it. Returns nested_offset.
template <ScaleKind kScales>
__device__ __forceinline__ float load_codebooks(const WeightView& weight, float* quant_map,
                                                float* nested_quant_map) {
    if (threadIdx.x < 16) quant_map[threadIdx.x] = weight.quant_map[threadIdx.x];
    if constexpr (kScales == ScaleKind::kNested) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) nested_quant_map[i] = weight.nested_quant_map[i];
        return *weight.nested_offset;
    }
    return 0;
}

// A block's scale as it is stored, so that it can be loaded ahead of its use.
struct StoredScale {
    float outer;  // or the scale, in fp32
    uint8_t code;
};

template <ScaleKind kScales>
__device__ __forceinline__ StoredScale stored_scale(const WeightView& weight, int64_t block) {
    if constexpr (kScales == ScaleKind::kNested)
        return {weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift],
                static_cast<const uint8_t*>(weight.absmax)[block]};
    else if constexpr (kScales == ScaleKind::kPowerOfTwo)
        return {0, static_cast<const uint8_t*>(weight.absmax)[block]};
    else
        return {static_cast<const float*>(weight.absmax)[block], 0};
}

template <ScaleKind kScales>
__device__ __forceinline__ float scale_of(const StoredScale& stored, const float* nested_quant_map,
                                          float nested_offset) {
    // Rounded twice, not fused.
    if constexpr (kScales == ScaleKind::kNested)
        return __fadd_rn(__fmul_rn(nested_quant_map[stored.code], stored.outer), nested_offset);
    else if constexpr (kScales == ScaleKind::kPowerOfTwo)
        return bits_float(power_of_two_bits(stored.code));
    else
        return stored.outer;
}

template <ScaleKind kScales>
__device__ __forceinline__ float block_scale(const WeightView& weight, const float* nested_quant_map,
                                             float nested_offset, int64_t block) {
    return scale_of<kScales>(stored_scale<kScales>(weight, block), nested_quant_map, nested_offset);
}

// A weight's scales where their kind is known at run time only.
struct Scales {
    ScaleKind kind;
    const float* nested_quant_map;
    float nested_offset;

    __device__ StoredScale stored(const WeightView& weight, int64_t block) const {
        if (kind == ScaleKind::kNested) return stored_scale<ScaleKind::kNested>(weight, block);
        if (kind == ScaleKind::kPowerOfTwo) return stored_scale<ScaleKind::kPowerOfTwo>(weight, block);
        return stored_scale<ScaleKind::kFloat>(weight, block);
    }
    __device__ float of(const StoredScale& stored) const {
        if (kind == ScaleKind::kNested)
            return scale_of<ScaleKind::kNested>(stored, nested_quant_map, nested_offset);
        if (kind == ScaleKind::kPowerOfTwo) return scale_of<ScaleKind::kPowerOfTwo>(stored, nullptr, 0);
        return scale_of<ScaleKind::kFloat>(stored, nullptr, 0);
    }
};

// The two values of a byte, rounded to 16 bits, the even one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t value_pair(const float* quant_map, uint32_t byte, float scale) {
    return pair_bits<T>(quant_map[byte >> 4 & 15] * scale, quant_map[byte & 15] * scale);
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
