// A weight [rows, columns] as kernels and launchers take it: pointers and sizes, without PyTorch. `Weight` (weight.h)
// makes it from checked tensors. On CUDA all pointers are device pointers.
//
// Everything here is `static`, as in common/half.h.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/integers.h"

namespace peftcore {

// Block sizes of values and of scales are powers of two.
constexpr int kMinBlocksize = 32;
constexpr int kMaxBlocksize = 4096;

struct WeightView {
    int64_t rows = 0, columns = 0;

    const void* dense = nullptr;  // values, contiguous; or nullptr, and the weight is in 4 bits
    int itemsize = 0;             // bytes of a dense value

    const uint8_t* codes = nullptr;    // two a byte, the even element in the high nibble
    const void* absmax = nullptr;      // of each block: fp32, or with nested scales uint8
    const float* quant_map = nullptr;  // [16]
    int shift = 0;                     // log2 of the block size

    const float *nested_absmax = nullptr, *nested_quant_map = nullptr, *nested_offset = nullptr;
    int nested_shift = 0;  // log2 of the block size of scales
    int64_t first_block =
        0;  // of this weight, counted from where `nested_absmax` begins: an expert's may be any

    PEFTCORE_HD int64_t numel() const { return rows * columns; }
    PEFTCORE_HD int64_t blocks() const { return ceil_div(numel(), int64_t(1) << shift); }
};

// The scale of a block, on the host. Compiled with -ffp-contract=off: the product is rounded before the sum.
static inline float block_scale(const WeightView& weight, int64_t block) {
    if (weight.nested_absmax == nullptr) return static_cast<const float*>(weight.absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(weight.absmax)[block];
    const float outer = weight.nested_absmax[(weight.first_block + block) >> weight.nested_shift];
    const float product = weight.nested_quant_map[code] * outer;
    return product + *weight.nested_offset;
}

// Scales of blocks [first, last). A loop that also stores reads scales faster from here than one by one: as far as the
// compiler knows, each store could change the weight, and loads wait for the store buffer.
static inline void block_scales(const WeightView& weight, int64_t first, int64_t last, float* out) {
    if (weight.nested_absmax == nullptr) {
        const float* absmax = static_cast<const float*>(weight.absmax);
        for (int64_t b = first; b < last; ++b) out[b - first] = absmax[b];
        return;
    }
    const uint8_t* absmax = static_cast<const uint8_t*>(weight.absmax);
    const float offset = *weight.nested_offset;
    for (int64_t b = first; b < last;) {
        const int64_t nested = (weight.first_block + b) >> weight.nested_shift;
        const int64_t run = ((nested + 1) << weight.nested_shift) - weight.first_block;
        const int64_t stop = run < last ? run : last;
        const float outer = weight.nested_absmax[nested];
        for (; b < stop; ++b) {
            const float product = weight.nested_quant_map[absmax[b]] * outer;
            out[b - first] = product + offset;
        }
    }
}

// View, without a copy, of expert `index` of a weight [experts, out, in], whose view has experts * out rows. In 4 bits
// an expert consists of whole blocks. It may begin within a block of scales.
static PEFTCORE_HD WeightView expert_of(const WeightView& weight, int64_t index, int64_t experts) {
    WeightView expert = weight;
    expert.rows = weight.rows / experts;
    const int64_t begin = index * expert.numel(), block = begin >> weight.shift;
    if (weight.dense != nullptr) {
        expert.dense = static_cast<const char*>(weight.dense) + begin * weight.itemsize;
        return expert;
    }
    expert.codes = weight.codes + begin / 2;
    expert.absmax = static_cast<const char*>(weight.absmax) +
                    block * (weight.nested_absmax == nullptr ? sizeof(float) : 1);
    if (weight.nested_absmax != nullptr) {
        const int64_t first = weight.first_block + block, nested = first >> weight.nested_shift;
        expert.nested_absmax = weight.nested_absmax + nested;
        expert.first_block = first - (nested << weight.nested_shift);
    }
    return expert;
}

}  // namespace peftcore
