// The products with a weight in 4 bits on CUDA, for linear_4bit and LoRA. The caller has checked all.
#pragma once

#include "weight/weight.h"

namespace peftcore {
namespace quant4 {

// W in `like`'s dtype: itself, or unpacked into memory that the caching allocator hands out again for the next
// layer.
at::Tensor dense_weight(const Weight& weight, const at::Tensor& like);

// x Wᵀ + bias + thin factorᵀ straight from 4 bits, of at most kLinearMaxBatch rows of x; all but x and W may be
// undefined.
at::Tensor linear_direct(const at::Tensor& x, const WeightView& weight, const at::Tensor& bias,
                         const at::Tensor& thin, const at::Tensor& factor);

}  // namespace quant4
}  // namespace peftcore
