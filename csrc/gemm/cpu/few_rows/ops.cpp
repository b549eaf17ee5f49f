// dense_linear on CPU. Schema: peftcore/ops/dense_linear.py.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "cpu/kernels.h"
#include "gemm/cpu/few_rows/linear.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace gemm {

using at::Tensor;

namespace {

constexpr int64_t kProductsPerTask = 1 << 17, kGranule = 8;  // rows of W

const BFloat16* bits(const Tensor& t) { return static_cast<const BFloat16*>(t.const_data_ptr()); }

}  // namespace

Tensor dense_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const FewRowsKernel& kernel = cpu_kernels().few_rows;
    if (x.scalar_type() != at::kBFloat16 || x.size(0) > kernel.max_batch || x.numel() == 0 ||
        !weight.is_contiguous()) {
        const Tensor transposed = weight.t();
        return bias.defined() ? at::cpu::addmm(bias, x, transposed) : at::cpu::mm(x, transposed);
    }
    const Tensor source = x.contiguous(), y = at::empty({x.size(0), weight.size(0)}, x.options());
    const FewRows args{.x = bits(source),
                       .batch = x.size(0),
                       .inner = x.size(1),
                       .w = bits(weight),
                       .columns = weight.size(0),
                       .bias = bias.defined() ? bits(bias) : nullptr,
                       .y = static_cast<BFloat16*>(y.mutable_data_ptr())};
    at::parallel_for(0, ceil_div(args.columns, kGranule),
                     ceil_div(kProductsPerTask, kGranule * args.inner * args.batch),
                     [&](int64_t first, int64_t last) {
                         kernel.run(args, {first * kGranule, std::min(last * kGranule, args.columns)});
                     });
    return y;
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
