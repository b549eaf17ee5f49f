// rms_norm and its gradients on CUDA. Schemas and formulas: peftcore/ops/rms_norm.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/cuda_stream.h"
#include "common/cuda_sum.h"
#include "common/cuda_support.h"
#include "common/tensors.h"
#include "norms/arguments.h"
#include "norms/cuda/rms_norm_cuda.h"

namespace peftcore {
namespace norms {
namespace {

RmsNormCall rms_norm_call(const Tensor& rows, const Tensor& weight, double offset, bool rounded,
                          const Tensor& scale, const char* op) {
    return {.dtype = kernel_dtype(rows.scalar_type(), op),
            .weight_dtype = kernel_dtype(weight.scalar_type(), op, "weight"),
            .rows = rows.size(0),
            .columns = rows.size(1),
            .x = rows.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .offset = float(offset),
            .rounded = rounded,
            .scale = scale.mutable_data_ptr<float>()};
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, double offset,
                                         bool rounded) {
    const char* op = "rms_norm";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_norm(x, weight, op);
    const c10::DeviceGuard guard(x.device());
    const Tensor rows = matrix(x), w = weight.contiguous(), y = at::empty(x.sizes(), x.options());
    const Tensor scale = at::empty({rows.size(0)}, x.options().dtype(at::kFloat));
    RmsNormCall call = rms_norm_call(rows, w, offset, rounded, scale, op);
    call.eps = float(eps);
    call.y = y.mutable_data_ptr();
    check_launch(peftcore_rms_norm(&call, current_cuda_stream(x.device())), op);
    return {y, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                  const Tensor& scale, double offset, bool rounded,
                                                  std::array<bool, 2> needs) {
    const char* op = "rms_norm_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_norm_gradient(grad, x, weight, scale, op);
    const c10::DeviceGuard guard(x.device());
    void* stream = current_cuda_stream(x.device());
    const Tensor rows = matrix(x), dy = matrix(grad), w = weight.contiguous(), r = scale.contiguous();
    const Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
    const Tensor dweight = at::empty({needs[1] ? rows.size(1) : 0}, weight.options());
    RmsNormCall call = rms_norm_call(rows, w, offset, rounded, r, op);
    call.dy = dy.const_data_ptr();
    if (needs[0]) {
        call.dx = dx.mutable_data_ptr();
        check_launch(peftcore_rms_norm_dx(&call, stream), op);
    }
    if (needs[1]) {
        const int64_t groups = peftcore_rms_norm_groups(call.rows);
        const Tensor sums = at::empty({groups, call.columns}, r.options());
        call.sums = sums.mutable_data_ptr<float>();
        check_launch(peftcore_rms_norm_dweight(&call, stream), op);
        check_launch(peftcore_sum(call.sums, groups, call.columns, 1, dweight.mutable_data_ptr(),
                                  int(call.weight_dtype), stream),
                     op);
    }
    return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("rms_norm", &OrReference<"peftcore::rms_norm", "", &rms_norm_cuda>::call);
    m.impl("rms_norm_backward",
           &OrReference<"peftcore::rms_norm_backward", "", &rms_norm_backward_cuda>::call);
}

}  // namespace norms
}  // namespace peftcore
