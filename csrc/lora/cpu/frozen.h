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

// A matrix on the right of rows: Wᵀ, if `transposed`, or W. Where the view is of no memory, it can be read by no
// kernel of ours.
struct Right {
    WeightView view;
    bool transposed;
    const WeightView* following = nullptr;  // see gemm::Product; of the sizes of `view`

    bool packed() const { return view.codes != nullptr; }
};

// Products of many rows like x.
const gemm::ManyRows& many_rows(const CpuKernels& kernels, const Tensor& x);

// It as gemm::multiply reads it; or none, for this processor, dtype of x or shape. It refers to `right`.
std::optional<gemm::Tiles> tiles_of(const CpuKernels& kernels, const Tensor& x, const Right& right);

// left factor, of all but what is masked. Factors are fp32, contiguous; the right one lies as W does: with Wᵀ as
// [columns of y, r], with W as [r, columns of y].
struct ThinProduct {
    const Tensor &left, &right;
    const Mask& keep;
};

// y = x right + bias + thin in the same sums, rounded once; or false where this processor, dtype or shape has no
// product that takes them, and `up` must add them.
bool whole_product(const CpuKernels& kernels, const Tensor& x, const Right& right, const Tensor& bias,
                   const ThinProduct& thin, const Tensor& y);

// The same of a weight, s Bᵀ or keep ∘ (t A); undefined for false.
Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b);
Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep);

}  // namespace lora
}  // namespace peftcore
