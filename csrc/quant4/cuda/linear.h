// Products with a weight in 4 bits on CUDA, for linear_4bit and LoRA. The caller has checked the arguments.
#pragma once

#include "weight/weight.h"

namespace peftcore {
namespace quant4 {

// W in `like`'s dtype: the dense weight, or one unpacked into memory that the caching allocator reuses for the next
// layer.
at::Tensor dense_weight(const Weight& weight, const at::Tensor& like);

// x Wᵀ + bias + thin factorᵀ directly from 4 bits, or undefined where there is no kernel for x and W; all but these two
// may be undefined.
at::Tensor linear_direct(const at::Tensor& x, const Weight& weight, const at::Tensor& bias,
                         const at::Tensor& thin, const at::Tensor& factor);

}  // namespace quant4
}  // namespace peftcore
