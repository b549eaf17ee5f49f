// Checks on operator arguments. A failed one says what was wanted, what was found, and by whom.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace peftcore {

inline void check_tensor(const at::Tensor& t, at::ScalarType dtype, const at::Device& device, const char* op,
                         const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", found ",
                     t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, " must be on ", device, ", found ", t.device());
}

inline void check_numel(const at::Tensor& t, int64_t wanted, const char* op, const char* name,
                        const char* why) {
    TORCH_CHECK_VALUE(t.numel() == wanted, op, ": ", name, " must hold ", wanted, " elements (", why,
                      "), found ", t.numel(), " of shape ", t.sizes());
}

}  // namespace peftcore
