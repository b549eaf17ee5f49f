// Products with a weight in 4 bits, by the fastest way for their sizes on this machine. x, dy and the results are
// matrices; the caller has checked them.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/integers.h"
#include "cpu/kernels.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {

// x Wᵀ + bias; `bias` may be undefined.
at::Tensor linear(const at::Tensor& x, const WeightView& weight, const at::Tensor& bias);
// dy W
at::Tensor linear_backward(const at::Tensor& dy, const WeightView& weight);

// Additional work of the threads of a product, before and after each one's rows of W.
class Companion {
 public:
    virtual void before() = 0;
    virtual void after(Range rows) = 0;  // of W: these columns of y are complete

 protected:
    ~Companion() = default;
};

// Arguments of `linear_direct`: contiguous rows of x, and the address of y.
struct DirectLinear {
    const void* x;
    int64_t rows;
    const void* bias;  // or nullptr
    void* y;
    Dtype dtype;
    Companion* companion = nullptr;
};

// y = x Wᵀ + bias directly from 4 bits. Returns false, with y not written, if x has too many rows for that, if no kernel
// reads the shape, or if all that do reject the values of x or of the codebook. No dimension may be 0.
bool linear_direct(const CpuKernels& kernels, const DirectLinear& args, const WeightView& weight);

// Whether `linear_direct` is the fastest way for so many rows, unless the kernel rejects x's values.
bool has_direct_kernel(const CpuKernels& kernels, const WeightView& weight, Dtype dtype, int64_t rows);

}  // namespace quant4
}  // namespace peftcore
