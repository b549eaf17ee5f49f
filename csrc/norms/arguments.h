// Argument checks of rms_norm. Schema: peftcore/ops/rms_norm.py.
#pragma once

#include "weight/linear_arguments.h"

namespace peftcore {
namespace norms {

using at::Tensor;

inline void check_norm(const Tensor& x, const Tensor& weight, const char* op) {
    kernel_dtype(x.scalar_type(), op);
    kernel_dtype(weight.scalar_type(), op, "weight");
    TORCH_CHECK_VALUE(weight.device() == x.device(), op, ": weight must be on ", x.device(),
                      " like x, found ", weight.device());
    TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension, found a scalar");
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": weight must be [", x.size(-1),
                      "] for x, found ", weight.sizes());
}

inline void check_norm_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                const Tensor& scale, const char* op) {
    check_norm(x, weight, op);
    check_like(grad, x, op, "grad");
    TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must be ", x.sizes(), " like x, found ",
                      grad.sizes());
    check_tensor(scale, at::kFloat, x.device(), op, "scale");
    const at::IntArrayRef sizes = x.sizes();
    const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
    TORCH_CHECK_VALUE(scale.dim() == 1 && scale.size(0) == rows, op, ": scale must be [", rows, "], found ",
                      scale.sizes());
}

}  // namespace norms
}  // namespace peftcore
