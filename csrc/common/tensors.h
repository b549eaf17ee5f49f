// Tensors as operators pass them to kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace peftcore {

// t as a contiguous matrix [product of the leading dimensions, last].
inline at::Tensor matrix(const at::Tensor& t) {
    const at::IntArrayRef sizes = t.sizes();
    return t.contiguous().view({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});
}

// A LoRA factor as low-rank products take it: fp32, contiguous.
inline at::Tensor floats(const at::Tensor& factor) { return factor.to(at::kFloat).contiguous(); }

}  // namespace peftcore
