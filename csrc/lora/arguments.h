// Argument checks of the lora operators, the same for every backend.
#pragma once

#include <string>

#include "common/dropout_arguments.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace lora {

using at::Tensor;

// The operand that factors must match: x, or a weight.
struct Operand {
    const char* name;
    at::Device device;
    int64_t columns;
};

// A [r, in] and B [out, r].
inline void check_factors(const Operand& operand, const Tensor& a, const Tensor& b, int64_t out_features,
                          const char* op, const std::string& a_name = "a", const std::string& b_name = "b") {
    const auto check = [&](const Tensor& t, const std::string& name) {
        TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()) && t.element_size() > 1, op, ": ", name,
                         " must be a 16-, 32- or 64-bit floating-point tensor, found ", t.scalar_type());
        TORCH_CHECK_VALUE(t.device() == operand.device, op, ": ", name, " must be on ", operand.device,
                          " like ", operand.name, ", found ", t.device());
        TORCH_CHECK_VALUE(t.dim() == 2, op, ": ", name, " must have two dimensions, found ", t.sizes());
    };
    check(a, a_name);
    check(b, b_name);
    TORCH_CHECK_VALUE(a.size(1) == operand.columns, op, ": ", a_name, " must be [r, ", operand.columns,
                      "] for ", operand.name, ", found ", a.sizes());
    TORCH_CHECK_VALUE(b.size(0) == out_features && b.size(1) == a.size(0), op, ": ", b_name, " must be [",
                      out_features, ", ", a.size(0), "], found ", b.sizes());
}

inline Operand operand(const Tensor& x) { return {"x", x.device(), x.size(-1)}; }

// dy [.., out] and S [rows, r], of x [.., in].
inline void check_gradient(const Tensor& grad, const Tensor& s, const Tensor& x, int64_t out_features,
                           int64_t r, const char* op) {
    check_like(grad, x, op, "grad");
    const std::vector<int64_t> shape = with_last(x, out_features);
    const at::IntArrayRef expected = shape;
    TORCH_CHECK_VALUE(grad.sizes() == expected, op, ": grad must be ", expected, ", found ", grad.sizes());
    check_tensor(s, at::kFloat, x.device(), op, "s");
    const at::IntArrayRef sizes = x.sizes();
    const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
    TORCH_CHECK_VALUE(s.dim() == 2 && s.size(0) == rows && s.size(1) == r, op, ": s must be [", rows, ", ", r,
                      "], found ", s.sizes());
}

// Adapters by number, and the one of each sample. Whether the numbers exist is seen where they are read.
inline void check_adapters(const Tensor& x, at::TensorList a, at::TensorList b, at::ArrayRef<double> scales,
                           const Tensor& index, int64_t out_features, const char* op) {
    TORCH_CHECK_VALUE(x.dim() > 1, op, ": x must be [samples, .., in], found ", x.sizes());
    TORCH_CHECK_VALUE(a.size() == b.size() && b.size() == scales.size(), op,
                      ": a, b and scales must be of one length, found ", a.size(), ", ", b.size(), " and ",
                      scales.size());
    for (size_t i = 0; i < a.size(); ++i)
        check_factors(operand(x), a[i], b[i], out_features, op, "a[" + std::to_string(i) + "]",
                      "b[" + std::to_string(i) + "]");
    check_tensor(index, at::kLong, x.device(), op, "index");
    TORCH_CHECK_VALUE(index.dim() == 1 && index.size(0) == x.size(0), op, ": index must be [", x.size(0),
                      "], one for each sample of x, found ", index.sizes());
}

}  // namespace lora
}  // namespace peftcore
