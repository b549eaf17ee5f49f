// dense_linear on CPU. Schema: peftcore/ops/dense_linear.py.
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "gemm/cpu/matrices.h"
#include "gemm/cpu/skinny/linear.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace gemm {

using at::Tensor;

namespace {

constexpr int64_t kGranule = 8;  // rows of W

void multiply_skinny(const SkinnyKernel& kernel, const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& y) {
    const SkinnyProduct args{.x = x.const_data_ptr(),
                             .batch = x.size(0),
                             .inner = x.size(1),
                             .w = weight.const_data_ptr(),
                             .columns = weight.size(0),
                             .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
                             .y = y.mutable_data_ptr()};
    at::parallel_for(0, ceil_div(args.columns, kGranule),
                     ceil_div(kProductsPerTask, kGranule * args.inner * args.batch),
                     [&](int64_t first, int64_t last) {
                         kernel.run(args, {first * kGranule, std::min(last * kGranule, args.columns)});
                     });
}

}  // namespace

Tensor dense_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const std::optional<Dtype> dtype = known_dtype(x.scalar_type());
    if (dtype.has_value() && x.numel() != 0 && weight.size(0) != 0) {
        const CpuKernels& kernels = cpu_kernels();
        const ManyRows& products = kernels.many_rows[int(*dtype)];
        const auto empty = [&] { return at::empty({x.size(0), weight.size(0)}, x.options()); };
        const SkinnyKernel& skinny = kernels.skinny[int(*dtype)];
        if (x.size(0) <= skinny.max_batch && weight.is_contiguous()) {
            const Tensor y = empty();
            multiply_skinny(skinny, x.contiguous(), weight, bias, y);
            return y;
        }
        if (products.beats_library && x.size(0) >= products.least_rows) {
            const Layout layout = layout_of(weight);
            const WeightView view = view_of(layout.matrix);
            const Tensor y = empty(), source = x.contiguous();
            multiply(products.kernel,
                     product_of(source, *tiles_of(products, view, !layout.transposed), bias, y));
            return y;
        }
    }
    const Tensor transposed = weight.t();
    return bias.defined() ? at::cpu::addmm(bias, x, transposed) : at::cpu::mm(x, transposed);
}

namespace {

Tensor dense_linear_of_any_shape(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const char* op = "dense_linear";
    const Weight checked(weight, {}, op);
    check_linear(x, checked, bias, op);
    return dense_linear(matrix(x), weight, contiguous(bias)).view(with_last(x, checked.rows()));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("dense_linear", &dense_linear_of_any_shape); }

}  // namespace gemm
}  // namespace peftcore
