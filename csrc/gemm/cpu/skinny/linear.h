// The product with a dense weight, by the fastest way for its sizes on this machine. The caller has checked the
// arguments.
#pragma once

#include <ATen/core/Tensor.h>

namespace peftcore {
namespace gemm {

// x Wᵀ + bias of matrices; `bias` may be undefined.
at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace gemm
}  // namespace peftcore
