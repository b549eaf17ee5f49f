// The product with a dense weight, by whichever way is fastest for its sizes here. The caller has checked all.
#pragma once

#include <ATen/core/Tensor.h>

namespace peftcore {
namespace gemm {

// x Wᵀ + bias, if any, of matrices.
at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace gemm
}  // namespace peftcore
