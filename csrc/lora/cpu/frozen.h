// The product with the frozen weight, alone or fused with the low-rank product. x and dy are matrices, and the caller has
// checked the arguments.
#pragma once

#include "cpu/kernels.h"
#include "lora/arguments.h"
#include "lora/cpu/kernels.h"

namespace peftcore {
namespace lora {

// x Wᵀ + bias
Tensor frozen_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias);
// dy W
Tensor frozen_linear_backward(const Tensor& dy, const Weight& weight);

// A weight as right operand: Wᵀ if `transposed`, else W. The view is empty if our kernels cannot read the weight.
struct Right {
    WeightView view;
    bool transposed;
    const WeightView* following = nullptr;  // see gemm::Product; of the sizes of `view`

    bool packed() const { return view.codes != nullptr; }
};

// Products of many rows like x.
const gemm::ManyRows& many_rows(const CpuKernels& kernels, const Tensor& x);

// Returns the operand as gemm::multiply reads it, or nullopt if that does not support the processor, x's dtype or the
// shape. The result refers to `right`.
std::optional<gemm::Tiles> tiles_of(const CpuKernels& kernels, const Tensor& x, const Right& right);

// keep ∘ (left factor). Factors are fp32, contiguous; the right one has W's layout: with Wᵀ [columns of y, r], with W
// [r, columns of y].
struct ThinProduct {
    const Tensor &left, &right;
    const Mask& keep;
};

// y = x right + bias + the low-rank product, accumulated in the same sums and rounded once. Returns false if no kernel
// supports the processor, dtype or shape; `up` must then add the low-rank product.
bool whole_product(const CpuKernels& kernels, const Tensor& x, const Right& right, const Tensor& bias,
                   const ThinProduct& thin, const Tensor& y);

// `whole_product` of a weight, with s Bᵀ or keep ∘ (t A); undefined where that returns false.
Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b);
Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep);

}  // namespace lora
}  // namespace peftcore
