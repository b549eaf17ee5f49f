// Tensors as `multiply` takes them.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/check.h"
#include "gemm/cpu/kernels.h"

namespace peftcore {
namespace gemm {

// y = x right + bias, if any, of contiguous matrices of one dtype.
inline Product product_of(const at::Tensor& x, const Tiles& right, const at::Tensor& bias,
                          const at::Tensor& y) {
    return {.x = x.const_data_ptr(),
            .dtype = kernel_dtype(x.scalar_type(), "product"),
            .right = right,
            .rows = x.size(0),
            .inner = x.size(1),
            .columns = y.size(1),
            .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
            .y = y.mutable_data_ptr()};
}

// View of a contiguous matrix.
inline WeightView view_of(const at::Tensor& matrix) {
    WeightView view;
    view.rows = matrix.size(0);
    view.columns = matrix.size(1);
    view.dense = matrix.const_data_ptr();
    view.itemsize = int(matrix.element_size());
    return view;
}

// A matrix of any strides as a contiguous one: itself, its transpose or a copy.
struct Layout {
    at::Tensor matrix;
    bool transposed;  // it is the transpose that is contiguous
};
inline Layout layout_of(const at::Tensor& matrix) {
    const at::Tensor turned = matrix.t();
    if (!matrix.is_contiguous() && turned.is_contiguous()) return {turned, true};
    return {matrix.contiguous(), false};
}

}  // namespace gemm
}  // namespace peftcore
