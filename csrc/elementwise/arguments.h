// Argument checks of gated, swiglu and activated.
#pragma once

#include "weight/linear_arguments.h"

namespace peftcore {
namespace elementwise {

using at::Tensor;

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

}  // namespace elementwise
}  // namespace peftcore
