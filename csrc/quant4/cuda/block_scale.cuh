// A weight's codebooks in shared memory, and scales and values bit for bit as in the CPU kernels.
#pragma once

#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/half.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// A block's scale and zero point as they are stored, so that they can be loaded ahead of their use.
struct StoredScale {
    uint32_t bits;   // of the scale; of nested scales, of the scale's own scale
    uint32_t other;  // code of a nested scale; zero point, of affine codes
};

// The values of a block's entries of the codebook, in fp32.
struct Scale {
    float factor;
    __device__ __forceinline__ float value(float entry) const { return entry * factor; }
};
struct ScaleAndZero {
    float factor, zero;
    __device__ __forceinline__ float value(float entry) const { return (entry - zero) * factor; }
};

// Scales of a kind that the kernel is compiled for. The codebooks are in shared memory.
template <ScaleKind kScales>
struct KnownScales {
    using Decoded = std::conditional_t<kScales == ScaleKind::kAffine, ScaleAndZero, Scale>;
    static constexpr int kEntries = kScales == ScaleKind::kNested ? 256 : 1;  // of `nested_quant_map`

    const float* nested_quant_map;
    float nested_offset;

    // Loads the codebooks; all threads of a block call it, and synchronize before they read scales.
    static __device__ __forceinline__ KnownScales load(const WeightView& weight, float* quant_map,
                                                       float* nested_quant_map) {
        if (threadIdx.x < 16) quant_map[threadIdx.x] = weight.quant_map[threadIdx.x];
        if constexpr (kScales == ScaleKind::kNested) {
            for (int i = threadIdx.x; i < 256; i += blockDim.x)
                nested_quant_map[i] = weight.nested_quant_map[i];
            return {nested_quant_map, *weight.nested_offset};
        }
        return {nested_quant_map, 0};
    }

    static __device__ __forceinline__ StoredScale stored(const WeightView& weight, int64_t block) {
        if constexpr (kScales == ScaleKind::kNested)
            return {float_bits(weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift]),
                    static_cast<const uint8_t*>(weight.absmax)[block]};
        else if constexpr (kScales == ScaleKind::kPowerOfTwo)
            return {static_cast<const uint8_t*>(weight.absmax)[block], 0};
        else if constexpr (kScales == ScaleKind::kAffine) {
            StoredScale scale;
            scale.bits = weight.scale_dtype == Dtype::kFloat
                             ? static_cast<const uint32_t*>(weight.absmax)[block]
                             : static_cast<const uint16_t*>(weight.absmax)[block];
            scale.other = weight.zeros == nullptr ? kCentre
                          : weight.whole_zeros    ? static_cast<const uint8_t*>(weight.zeros)[block]
                                                  : static_cast<const uint32_t*>(weight.zeros)[block];
            return scale;
        } else
            return {static_cast<const uint32_t*>(weight.absmax)[block], 0};
    }

    __device__ __forceinline__ Decoded decode(const WeightView& weight, const StoredScale& stored) const {
        // Rounded twice, not fused.
        if constexpr (kScales == ScaleKind::kNested)
            return {
                __fadd_rn(__fmul_rn(nested_quant_map[stored.other], bits_float(stored.bits)), nested_offset)};
        else if constexpr (kScales == ScaleKind::kPowerOfTwo)
            return {bits_float(power_of_two_bits(uint8_t(stored.bits)))};
        else if constexpr (kScales == ScaleKind::kAffine)
            return {weight.scale_dtype == Dtype::kHalf       ? to_float(Half{uint16_t(stored.bits)})
                    : weight.scale_dtype == Dtype::kBFloat16 ? to_float(BFloat16{uint16_t(stored.bits)})
                                                             : bits_float(stored.bits),
                    (weight.whole_zeros ? float(stored.other) : bits_float(stored.other)) - float(kCentre)};
        else
            return {bits_float(stored.bits)};
    }
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore
