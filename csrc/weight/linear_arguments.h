// Argument checks of y = x Wᵀ + bias, shared by linear_4bit, LoRA and all backends.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "weight/weight.h"

namespace peftcore {

inline void check_like(const at::Tensor& t, const at::Tensor& x, const char* op, const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": ", name, " must be ", x.scalar_type(),
                     " like x, found ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", name, " must be on ", x.device(), " like x, found ",
                      t.device());
}

// Checks that the weight is a matrix in 4 bits.
inline void check_packed(const Weight& weight, const char* op) {
    TORCH_CHECK_VALUE(weight.packed(), op, ": the weight must be in 4 bits, found a dense one of shape ",
                      weight.sizes());
}

// Checks `out`, which takes the dequantized weight of these tensors, which are read while it is written.
inline void check_out(const Weight& weight, at::TensorList tensors, const at::Tensor& out, const char* op) {
    check_packed(weight, op);
    TORCH_CHECK_VALUE(out.device() == weight.first().device(), op, ": out must be on ",
                      weight.first().device(), ", found ", out.device());
    TORCH_CHECK_VALUE(out.sizes() == weight.sizes(), op, ": out must have the weight's shape ",
                      weight.sizes(), ", found ", out.sizes());
    for (const at::Tensor& part : tensors)
        TORCH_CHECK_VALUE(!out.is_alias_of(part), op,
                          ": out shares memory with the weight. Pass memory of its own");
}

// Checks `t` against W [out, in]: t is x, whose last dimension is `in`, or a gradient, whose last dimension is `out`.
inline void check_operand(const Weight& weight, const at::Tensor& t, const char* name, bool is_gradient,
                          const char* op) {
    kernel_dtype(t.scalar_type(), op);
    TORCH_CHECK_VALUE(weight.sizes().size() == 2, op, ": weight must be [out, in], found ", weight.sizes());
    if (!weight.packed())
        TORCH_CHECK_TYPE(weight.first().scalar_type() == t.scalar_type(), op, ": weight must be ",
                         t.scalar_type(), " like ", name, ", found ", weight.first().scalar_type());
    TORCH_CHECK_VALUE(weight.first().device() == t.device(), op, ": weight must be on ", t.device(), " like ",
                      name, ", found ", weight.first().device());
    TORCH_CHECK_VALUE(t.dim() > 0, op, ": ", name, " must have at least one dimension, found a scalar");
    const int64_t last = is_gradient ? weight.rows() : weight.columns();
    TORCH_CHECK_VALUE(t.size(-1) == last, op, ": ", name, " must be [.., ", last, "] for a weight ",
                      weight.sizes(), ", found ", t.sizes());
}

// Checks x, W and its bias.
inline void check_linear(const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                         const char* op) {
    check_operand(weight, x, "x", false, op);
    if (!bias.has_value()) return;
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.rows(), op, ": bias must be [",
                      weight.rows(), "], found ", bias->sizes());
    check_like(*bias, x, op, "bias");
}

// Returns the bias, contiguous; undefined if there is none.
inline at::Tensor contiguous(const std::optional<at::Tensor>& bias) {
    return bias.has_value() ? bias->contiguous() : at::Tensor();
}

// Returns t's shape with its last dimension replaced.
inline std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
    std::vector<int64_t> shape = t.sizes().vec();
    shape.back() = last;
    return shape;
}

}  // namespace peftcore
