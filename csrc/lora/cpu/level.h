// All kernels of a level that are loops over its vectors.
#pragma once

#include <array>

#include "lora/cpu/activated.h"
#include "lora/cpu/attention.h"
#include "lora/cpu/class_blocks.h"
#include "lora/cpu/cross_entropy.h"
#include "lora/cpu/dropped.h"
#include "lora/cpu/gates.h"
#include "lora/cpu/norms.h"
#include "lora/cpu/rms_norm.h"
#include "lora/cpu/rows.h"
#include "lora/cpu/scaled.h"
#include "lora/cpu/sums_of_rows.h"

namespace peftcore {
namespace lora {

// Four lanes gain nothing over PyTorch's.
template <Lanes Simd>
static std::array<AttentionKernels, kDtypes> attention_of() {
    if constexpr (Simd::kLanes < 8)
        return {};
    else
        return {Attention<Of<Simd, float>>::kernels(), Attention<Of<Simd, Half>>::kernels(),
                Attention<Of<Simd, BFloat16>>::kernels()};
}

// Arrays are indexed by Dtype.
template <Lanes Simd>
static Kernels kernels_of() {
    using F = Of<Simd, float>;
    using H = Of<Simd, Half>;
    using B = Of<Simd, BFloat16>;
    return {.thin = {Blocks<F>::kernels(), Blocks<H>::kernels(), Blocks<B>::kernels()},
            .row = {Rows<F>::kernels(), Rows<H>::kernels(), Rows<B>::kernels()},
            .scale = {Scaled<F>::kernels(), Scaled<H>::kernels(), Scaled<B>::kernels()},
            .gate = {Gates<F>::kernels(), Gates<H>::kernels(), Gates<B>::kernels()},
            .activation = {Activated<F>::kernels(), Activated<H>::kernels(), Activated<B>::kernels()},
            .dropped = {Dropped<F>::rows, Dropped<H>::rows, Dropped<B>::rows},
            .rms_norm = {RmsNorm<F>::kernels(), RmsNorm<H>::kernels(), RmsNorm<B>::kernels()},
            .row_sum = {SumsOfRows<F>::kernels(), SumsOfRows<H>::kernels(), SumsOfRows<B>::kernels()},
            .cross_entropy = {CrossEntropy<F>::rows, CrossEntropy<H>::rows, CrossEntropy<B>::rows},
            .class_block = {ClassBlocks<F>::rows, ClassBlocks<H>::rows, ClassBlocks<B>::rows},
            .norms = {Norms<F>::norms, Norms<H>::norms, Norms<B>::norms},
            .attention = attention_of<Simd>()};
}

}  // namespace lora
}  // namespace peftcore
