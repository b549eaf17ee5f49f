// gated and swiglu and their gradients on CUDA. Schemas and formulas: peftcore/ops/gated.py and swiglu.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "common/tensors.h"
#include "elementwise/arguments.h"
#include "elementwise/cuda/gated_cuda.h"

namespace peftcore {
namespace elementwise {
namespace {

// Of contiguous g and u.
GatedCall gated_call(const Tensor& gate, const Tensor& up, double linear, double cubic, const char* op) {
    return {.dtype = kernel_dtype(gate.scalar_type(), op),
            .gate = gate.const_data_ptr(),
            .up = up.const_data_ptr(),
            .rows = 1,
            .columns = gate.numel(),
            .linear = float(linear),
            .cubic = float(cubic)};
}

Tensor gated_cuda(const Tensor& gate, const Tensor& up, double linear, double cubic) {
    const char* op = "gated";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_gated(gate, up, linear, cubic, op);
    const c10::DeviceGuard guard(gate.device());
    const Tensor g = gate.contiguous(), u = up.contiguous(), y = at::empty(gate.sizes(), gate.options());
    GatedCall call = gated_call(g, u, linear, cubic, op);
    call.rounded = true;
    call.y = y.mutable_data_ptr();
    check_launch(peftcore_gated(&call, current_cuda_stream(gate.device())), op);
    return y;
}

std::tuple<Tensor, Tensor> gated_backward_cuda(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                               double linear, double cubic) {
    const char* op = "gated_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_gated_gradient(grad, gate, up, linear, cubic, op);
    const c10::DeviceGuard guard(gate.device());
    const Tensor g = gate.contiguous(), u = up.contiguous(), dy = grad.contiguous();
    const auto empty = [&] { return at::empty(gate.sizes(), gate.options()); };
    const Tensor dgate = empty(), dup = empty();
    GatedCall call = gated_call(g, u, linear, cubic, op);
    call.dy = dy.const_data_ptr();
    call.dgate = dgate.mutable_data_ptr();
    call.dup = dup.mutable_data_ptr();
    check_launch(peftcore_gated_backward(&call, current_cuda_stream(gate.device())), op);
    return {dgate, dup};
}

// Of rows [g, u].
GatedCall swiglu_call(const Tensor& rows, const char* op) {
    const auto* values = static_cast<const char*>(rows.const_data_ptr());
    const int64_t columns = rows.size(1) / 2;
    return {.dtype = kernel_dtype(rows.scalar_type(), op),
            .gate = values,
            .up = values + columns * rows.element_size(),
            .rows = rows.size(0),
            .columns = columns,
            .stride = 2 * columns,
            .linear = 1};
}

Tensor swiglu_cuda(const Tensor& x) {
    const char* op = "swiglu";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_swiglu(x, op);
    const c10::DeviceGuard guard(x.device());
    const Tensor rows = matrix(x), y = at::empty(with_last(x, x.size(-1) / 2), x.options());
    GatedCall call = swiglu_call(rows, op);
    call.y = y.mutable_data_ptr();
    check_launch(peftcore_gated(&call, current_cuda_stream(x.device())), op);
    return y;
}

Tensor swiglu_backward_cuda(const Tensor& grad, const Tensor& x) {
    const char* op = "swiglu_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_swiglu_gradient(grad, x, op);
    const c10::DeviceGuard guard(x.device());
    const Tensor rows = matrix(x), dy = matrix(grad), dx = at::empty(x.sizes(), x.options());
    GatedCall call = swiglu_call(rows, op);
    call.dy = dy.const_data_ptr();
    call.dgate = dx.mutable_data_ptr();
    call.dup = static_cast<char*>(call.dgate) + call.columns * x.element_size();
    check_launch(peftcore_gated_backward(&call, current_cuda_stream(x.device())), op);
    return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("gated", &OrReference<"peftcore::gated", "", &gated_cuda>::call);
    m.impl("gated_backward", &OrReference<"peftcore::gated_backward", "", &gated_backward_cuda>::call);
    m.impl("swiglu", &OrReference<"peftcore::swiglu", "", &swiglu_cuda>::call);
    m.impl("swiglu_backward", &OrReference<"peftcore::swiglu_backward", "", &swiglu_backward_cuda>::call);
}

}  // namespace elementwise
}  // namespace peftcore
