// Argument checks of rms_norm, gated, swiglu and activated, the same for every backend.
#pragma once

#include "weight/linear_arguments.h"

namespace peftcore {
namespace lora {

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

// Of an activation; its products then overflow only where the reference's do.
constexpr double kLargestCoefficient = 16;

inline void check_coefficients(double linear, double cubic, const char* op) {
    const auto check = [&](double number, const char* name) {
        TORCH_CHECK_VALUE(0 <= number && number <= kLargestCoefficient, op, ": ", name, " must be from 0 to ",
                          kLargestCoefficient, ", found ", number);
    };
    check(linear, "linear");
    check(cubic, "cubic");
}

inline void check_gated(const Tensor& gate, const Tensor& up, double linear, double cubic, const char* op) {
    kernel_dtype(gate.scalar_type(), op);
    TORCH_CHECK_TYPE(up.scalar_type() == gate.scalar_type(), op, ": up must be ", gate.scalar_type(),
                     " like gate, found ", up.scalar_type());
    TORCH_CHECK_VALUE(up.device() == gate.device(), op, ": up must be on ", gate.device(),
                      " like gate, found ", up.device());
    TORCH_CHECK_VALUE(up.sizes() == gate.sizes(), op, ": up must be ", gate.sizes(), " like gate, found ",
                      up.sizes());
    check_coefficients(linear, cubic, op);
}

inline void check_gated_gradient(const Tensor& grad, const Tensor& gate, const Tensor& up, double linear,
                                 double cubic, const char* op) {
    check_gated(gate, up, linear, cubic, op);
    check_like(grad, gate, op, "grad");
    TORCH_CHECK_VALUE(grad.sizes() == gate.sizes(), op, ": grad must be ", gate.sizes(), " like gate, found ",
                      grad.sizes());
}

inline void check_swiglu(const Tensor& x, const char* op) {
    kernel_dtype(x.scalar_type(), op);
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) % 2 == 0, op, ": x must be [.., 2 n], found ", x.sizes());
}

inline void check_swiglu_gradient(const Tensor& grad, const Tensor& x, const char* op) {
    check_swiglu(x, op);
    check_like(grad, x, op, "grad");
    const std::vector<int64_t> shape = with_last(x, x.size(-1) / 2);
    TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), op, ": grad must be ", at::IntArrayRef(shape),
                      ", found ", grad.sizes());
}

}  // namespace lora
}  // namespace peftcore
