// The base's product with W, alone or with the thin product that goes the same way.
#pragma once

#include "cpu/kernels.h"
#include "lora/arguments.h"

namespace peftcore {
namespace lora {

// Of the op's arguments; x and dy are matrices.
struct Base {
    const Tensor& weight;
    int64_t in_features, out_features;
    const Quantized& quantized;
    const char* op;
};

Tensor base(const Tensor& x, const Base& of, const std::optional<Tensor>& bias);  // x Wᵀ + bias
Tensor base_backward(const Tensor& dy, const Base& of);                           // dy W

// The same with s Bᵀ, and with keep ∘ (t A), in the same sums, rounded once; or undefined where this
// processor, dtype or shape has no product that takes them, and `up` must add them. Factors are fp32,
// contiguous.
Tensor joined(const CpuKernels& kernels, const Tensor& x, const Base& of, const std::optional<Tensor>& bias,
              const Tensor& s, const Tensor& b);
Tensor joined_backward(const CpuKernels& kernels, const Tensor& dy, const Base& of, const Tensor& t,
                       const Tensor& a, const Mask& keep);

}  // namespace lora
}  // namespace peftcore
