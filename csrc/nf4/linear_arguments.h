// Argument checks of linear_4bit, the same for every backend.
#pragma once

#include <vector>

#include "nf4/arguments.h"

namespace peftcore {
namespace nf4 {

// The bias, contiguous and checked against x; undefined if there is none.
inline Tensor linear_bias(const Tensor& x, int64_t out_features, const std::optional<Tensor>& bias,
                          const char* op) {
    TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension, found a scalar");
    TORCH_CHECK_VALUE(out_features >= 0, op, ": out_features must not be negative, found ", out_features);
    if (!bias.has_value()) return {};
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must be [", out_features,
                      "], found ", bias->sizes());
    check_tensor(*bias, x.scalar_type(), x.device(), op, "bias");
    return bias->contiguous();
}

// x's shape with another last size.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = last;
    return shape;
}

}  // namespace nf4
}  // namespace peftcore
