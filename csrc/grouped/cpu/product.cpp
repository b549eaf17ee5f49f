#include "grouped/cpu/product.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "gemm/cpu/matrices.h"
#include "quant4/cpu/linear/linear.h"
#include "quant4/cpu/linear/slab.h"

namespace peftcore {
namespace grouped {
namespace {

// Columns of y that the library computes in one call and one thread, so that its sums depend on shapes only.
constexpr int64_t kSlab = 256;
static_assert(kSlab % quant4::kSlabColumns == 0);

bool contiguous_each(const Tensor& t) {
    const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
    return (sizes[2] <= 1 || strides[2] == 1) && (sizes[1] <= 1 || strides[1] == sizes[2]);
}

// Columns [first, last) of the right operand.
Tensor slab_of(const Matrix& matrix, Range columns, const at::TensorOptions& options) {
    const int64_t count = columns.last - columns.first;
    const WeightView& view = matrix.right.view;
    if (matrix.right.transposed) {
        if (matrix.dense.defined()) return matrix.dense.narrow(0, columns.first, count).t();
        return quant4::dequantized_slab(view, columns, {0, view.columns}, options).t();
    }
    if (matrix.dense.defined()) return matrix.dense.narrow(1, columns.first, count);
    return quant4::dequantized_slab(view, {0, view.rows}, columns, options);
}

}  // namespace

Matrices::Matrices(const Weight& weight, bool transposed, const char* op)
    : weight_(weight), op_(op), flipped_(transposed) {
    if (weight.packed()) return;
    dense_ = weight.first();
    const Tensor turned = dense_.transpose(1, 2);
    if (contiguous_each(dense_) || !contiguous_each(turned)) return;
    dense_ = turned;
    flipped_ = !flipped_;
}

Matrix Matrices::matrix_of(int64_t expert, bool transposed) const {
    if (!dense_.defined()) return {{weight_.expert(expert, op_), transposed}, {}};
    Matrix matrix{{{}, transposed}, dense_.select(0, expert)};
    if (!contiguous_each(dense_)) return matrix;
    WeightView& view = matrix.right.view;
    view.rows = matrix.dense.size(0);
    view.columns = matrix.dense.size(1);
    view.dense = matrix.dense.const_data_ptr();
    view.itemsize = int(matrix.dense.element_size());
    return matrix;
}

bool multiply_few(const CpuKernels& kernels, const Tensor& x, const Group& group, const Matrix& matrix,
                  const Tensor& bias, const Tensor& y) {
    const WeightView& view = matrix.right.view;
    if (!matrix.right.packed() || !matrix.right.transposed || view.numel() == 0) return false;
    const auto at_row = [](const Tensor& t, int64_t row, int64_t columns) {
        return static_cast<const char*>(t.const_data_ptr()) + row * columns * t.element_size();
    };
    return quant4::linear_direct(kernels,
                                 {.x = at_row(x, group.first, view.columns),
                                  .rows = group.rows,
                                  .bias = bias.defined() ? at_row(bias, group.expert, view.rows) : nullptr,
                                  .y = const_cast<char*>(at_row(y, group.first, view.rows)),
                                  .dtype = kernel_dtype(x.scalar_type(), "grouped_linear")},
                                 view);
}

void multiply(const CpuKernels& kernels, const Tensor& x, const Matrix& matrix, const Tensor& bias,
              const Tensor& y) {
    if (y.numel() == 0) return;
    if (x.size(1) == 0) {
        bias.defined() ? y.copy_(bias) : y.zero_();
        return;
    }
    const lora::Right& right = matrix.right;
    if (multiply_few(kernels, x, {0, 0, x.size(0)}, matrix, bias, y)) return;
    if (const std::optional<gemm::Tiles> tiles = lora::tiles_of(kernels, x, right)) {
        gemm::Product product = gemm::product_of(x, *tiles, bias, y);
        product.following = right.following;
        return gemm::multiply(lora::many_rows(kernels, x).kernel, product);
    }
    const int64_t columns = y.size(1), slabs = ceil_div(columns, kSlab);
    // At least two: PyTorch opens no parallel region for one, and the library would then divide it among all threads.
    at::parallel_for(0, std::max<int64_t>(2, slabs), 1, [&](int64_t first, int64_t last) {
        const at::AutoDispatchBelowADInplaceOrView below;
        for (; first < std::min(last, slabs); ++first) {
            const Range range{first * kSlab, std::min((first + 1) * kSlab, columns)};
            const Tensor slab = slab_of(matrix, range, x.options());
            Tensor out = y.narrow(1, range.first, range.last - range.first);
            if (bias.defined())
                at::cpu::addmm_out(out, bias.narrow(0, range.first, range.last - range.first), x, slab);
            else
                at::cpu::mm_out(out, x, slab);
        }
    });
}

}  // namespace grouped
}  // namespace peftcore
