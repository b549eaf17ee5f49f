// Tensors as operators hand them to kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace peftcore {

// [all leading dimensions, last], contiguous.
inline at::Tensor matrix(const at::Tensor& t) {
    const at::IntArrayRef sizes = t.sizes();
    return t.contiguous().view({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});
}

// A factor of LoRA as products take it: fp32, contiguous.
inline at::Tensor floats(const at::Tensor& factor) { return factor.to(at::kFloat).contiguous(); }

}  // namespace peftcore
