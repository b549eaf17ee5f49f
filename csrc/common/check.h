// Checks of operator arguments. Errors name the operator, what it needs and what it found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/dtype.h"

namespace peftcore {

inline std::optional<Dtype> known_dtype(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return Dtype::kFloat;
        case at::kHalf:
            return Dtype::kHalf;
        case at::kBFloat16:
            return Dtype::kBFloat16;
        default:
            return {};
    }
}

inline Dtype kernel_dtype(at::ScalarType dtype, const char* op) {
    const std::optional<Dtype> supported = known_dtype(dtype);
    TORCH_CHECK_TYPE(supported, op, ": only float32, float16 and bfloat16 are supported, found ", dtype);
    return *supported;
}

inline Dtype kernel_dtype(at::ScalarType dtype, const char* op, const char* name) {
    const std::optional<Dtype> supported = known_dtype(dtype);
    TORCH_CHECK_TYPE(supported, op, ": ", name, " must be float32, float16 or bfloat16, found ", dtype);
    return *supported;
}

inline void check_tensor(const at::Tensor& t, at::ScalarType dtype, const at::Device& device, const char* op,
                         const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", found ",
                     t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, " must be on ", device, ", found ", t.device());
}

inline void check_numel(const at::Tensor& t, int64_t expected, const char* op, const char* name,
                        const char* reason) {
    TORCH_CHECK_VALUE(t.numel() == expected, op, ": ", name, " must hold ", expected, " elements (", reason,
                      "), found ", t.numel(), " of shape ", t.sizes());
}

}  // namespace peftcore
