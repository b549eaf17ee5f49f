// Argument checks of the grouped operators, shared by all backends. Schemas and formulas:
// peftcore/ops/grouped_operators.py.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

#include "lora/arguments.h"

namespace peftcore {
namespace grouped {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dA, dB

// (experts, out, in) of W [experts, out, in], or [experts, in, out] with `transposed`.
struct Sizes {
    int64_t experts, out, in;
};

inline Sizes sizes_of(const Weight& weight, bool transposed) {
    const at::IntArrayRef sizes = weight.sizes();
    return transposed ? Sizes{sizes[0], sizes[2], sizes[1]} : Sizes{sizes[0], sizes[1], sizes[2]};
}

// Checks `t`, which is x or a gradient, against W.
inline void check_weight(const Weight& weight, const Tensor& t, const char* name, const char* op) {
    kernel_dtype(t.scalar_type(), op);
    TORCH_CHECK_VALUE(weight.sizes().size() == 3, op,
                      ": weight must have dimensions for experts, out and in, found ", weight.sizes());
    const Tensor& first = weight.first();
    if (!weight.packed())
        TORCH_CHECK_TYPE(first.scalar_type() == t.scalar_type(), op, ": weight must be ", t.scalar_type(),
                         " like ", name, ", found ", first.scalar_type());
    TORCH_CHECK_VALUE(first.device() == t.device(), op, ": weight must be on ", t.device(), " like ", name,
                      ", found ", first.device());
    if (!weight.packed()) return;
    const int64_t expert_values = weight.sizes()[1] * weight.sizes()[2], blocksize = weight.blocksize();
    TORCH_CHECK_VALUE(expert_values % blocksize == 0, op, ": an expert must be whole blocks of ", blocksize,
                      ", found ", expert_values, " values in each");
}

// Checks x or a gradient [rows, columns], and the offsets at which each expert's rows end. Whether they increase is
// checked where they are read.
inline void check_rows(const Tensor& t, const char* name, int64_t columns, const Tensor& offsets,
                       int64_t experts, const char* op) {
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == columns, op, ": ", name, " must be [rows, ", columns,
                      "], found ", t.sizes());
    TORCH_CHECK_TYPE(offsets.scalar_type() == at::kInt, op, ": offsets must be ", at::kInt, ", found ",
                     offsets.scalar_type());
    TORCH_CHECK_VALUE(offsets.device() == t.device(), op, ": offsets must be on ", t.device(), " like ", name,
                      ", found ", offsets.device());
    TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == experts, op, ": offsets must be [", experts,
                      "], found ", offsets.sizes());
}

// Checks A [experts, r, in] and B [experts, out, r].
inline void check_factors(const Tensor& x, const Tensor& a, const Tensor& b, const Sizes& sizes,
                          const char* op) {
    const auto check = [&](const Tensor& t, const char* name) {
        TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()) && t.element_size() > 1, op, ": ", name,
                         " must be a 16-, 32- or 64-bit floating-point tensor, found ", t.scalar_type());
        TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", name, " must be on ", x.device(),
                          " like x, found ", t.device());
        TORCH_CHECK_VALUE(t.dim() == 3, op, ": ", name, " must have three dimensions, found ", t.sizes());
    };
    check(a, "a");
    check(b, "b");
    TORCH_CHECK_VALUE(a.size(0) == sizes.experts && a.size(2) == sizes.in, op, ": a must be [", sizes.experts,
                      ", r, ", sizes.in, "], found ", a.sizes());
    TORCH_CHECK_VALUE(b.size(0) == sizes.experts && b.size(1) == sizes.out && b.size(2) == a.size(1), op,
                      ": b must be [", sizes.experts, ", ", sizes.out, ", ", a.size(1), "], found ",
                      b.sizes());
}

// Checks of the forward pass, except for dropout, which `checked_dropout` checks.
inline Sizes check_grouped(const Tensor& x, const Tensor& offsets, const Weight& weight,
                           const std::optional<Tensor>& bias, at::TensorList factors, bool transposed,
                           const char* op) {
    check_weight(weight, x, "x", op);
    const Sizes sizes = sizes_of(weight, transposed);
    check_rows(x, "x", sizes.in, offsets, sizes.experts, op);
    if (bias.has_value()) {
        TORCH_CHECK_VALUE(bias->dim() == 2 && bias->size(0) == sizes.experts && bias->size(1) == sizes.out,
                          op, ": bias must be [", sizes.experts, ", ", sizes.out, "], found ", bias->sizes());
        check_like(*bias, x, op, "bias");
    }
    TORCH_CHECK_VALUE(factors.empty() || factors.size() == 2, op, ": factors must be [a, b] or [], found ",
                      factors.size());
    if (!factors.empty()) check_factors(x, factors[0], factors[1], sizes, op);
    return sizes;
}

// Checks of the backward pass, except for dropout.
inline Sizes check_grouped_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& offsets,
                                    const Weight& weight, at::TensorList factors, bool transposed,
                                    const std::optional<Tensor>& seed, const char* op) {
    check_weight(weight, grad, "grad", op);
    const Sizes sizes = sizes_of(weight, transposed);
    check_rows(grad, "grad", sizes.out, offsets, sizes.experts, op);
    TORCH_CHECK_VALUE(factors.empty() || factors.size() == 3, op, ": factors must be [a, b, s] or [], found ",
                      factors.size());
    if (factors.empty()) {
        TORCH_CHECK_VALUE(!seed.has_value(), op, ": seed is of no use without factors");
        return sizes;
    }
    const int64_t rows = grad.size(0);
    TORCH_CHECK_TYPE(x.has_value(), op, ": x must be a tensor if there are factors, found None");
    TORCH_CHECK_VALUE(x->dim() == 2 && x->size(0) == rows && x->size(1) == sizes.in, op, ": x must be [",
                      rows, ", ", sizes.in, "], found ", x->sizes());
    check_like(*x, grad, op, "x");
    check_factors(*x, factors[0], factors[1], sizes, op);
    const Tensor& s = factors[2];
    TORCH_CHECK_TYPE(s.scalar_type() == at::kFloat, op, ": s must be ", at::kFloat, " for x of ",
                     x->scalar_type(), ", found ", s.scalar_type());
    TORCH_CHECK_VALUE(s.device() == x->device(), op, ": s must be on ", x->device(), " like x, found ",
                      s.device());
    TORCH_CHECK_VALUE(s.dim() == 2 && s.size(0) == rows && s.size(1) == factors[0].size(1), op,
                      ": s must be [", rows, ", ", factors[0].size(1), "], found ", s.sizes());
    return sizes;
}

// Uninitialized results of the backward pass; those not needed are empty, [0].
inline std::tuple<Tensor, Tensor, Tensor> empty_gradients(const Tensor& grad, at::TensorList factors,
                                                          const Sizes& sizes, std::array<bool, 3> needs) {
    const auto empty = [](bool needed, at::IntArrayRef shape, const at::TensorOptions& options) {
        return at::empty(needed ? shape : at::IntArrayRef{0}, options);
    };
    const Tensor dx = empty(needs[0], {grad.size(0), sizes.in}, grad.options());
    if (factors.empty()) return {dx, empty(false, {}, grad.options()), empty(false, {}, grad.options())};
    return {dx, empty(needs[1], factors[0].sizes(), factors[0].options()),
            empty(needs[2], factors[1].sizes(), factors[1].options())};
}

}  // namespace grouped
}  // namespace peftcore
