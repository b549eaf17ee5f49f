// The products with a weight in 4 bits, by whichever way is fastest for their sizes here. x, dy and the results
// are matrices; the caller has checked them.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/integers.h"
#include "cpu/kernels.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {

at::Tensor linear(const at::Tensor& x, const WeightView& weight,
                  const at::Tensor& bias);                                   // x Wᵀ + bias, if any
at::Tensor linear_backward(const at::Tensor& dy, const WeightView& weight);  // dy W

// What the threads of a product do besides, each around its rows of W.
class Companion {
 public:
    virtual void before() = 0;
    virtual void after(Range rows) = 0;  // of W, whose columns of y are there

 protected:
    ~Companion() = default;
};

// Rows of x, contiguous, and where y belongs.
struct DirectLinear {
    const void* x;
    int64_t rows;
    const void* bias;  // or nullptr
    void* y;
    Dtype dtype;
    Companion* companion = nullptr;
};

// y = x Wᵀ + bias, if any, straight from 4 bits; or false: x has too many rows for that, or the shape is not one that
// kernels read. Nothing is empty.
bool linear_direct(const CpuKernels& kernels, const DirectLinear& args, const WeightView& weight);

// Whether a kernel of few rows is the fastest for so many, unless it refuses x's values.
bool has_direct_kernel(const CpuKernels& kernels, const WeightView& weight, Dtype dtype, int64_t rows);

}  // namespace quant4
}  // namespace peftcore
