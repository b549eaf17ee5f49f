// The product with the frozen weight, alone or with the thin product that goes the same way. x and dy are
// matrices; the caller has checked all.
#pragma once

#include "cpu/kernels.h"
#include "lora/arguments.h"
#include "lora/cpu/kernels.h"

namespace peftcore {
namespace lora {

Tensor frozen_linear(const Tensor& x, const Weight& weight,
                     const std::optional<Tensor>& bias);                // x Wᵀ + bias
Tensor frozen_linear_backward(const Tensor& dy, const Weight& weight);  // dy W

// The same with s Bᵀ, and with keep ∘ (t A), in the same sums, rounded once; or undefined where this
// processor, dtype or shape has no product that takes them, and `up` must add them. Factors are fp32,
// contiguous.
Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b);
Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep);

}  // namespace lora
}  // namespace peftcore
