// activated and its gradient on CPU. Schemas and formulas: peftcore/ops/activated.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "elementwise/arguments.h"

namespace peftcore {
namespace elementwise {
namespace {

constexpr int64_t kActivatedValues = 8192;  // of a task

ActivationArgs activation_args(const Tensor& x, bool normal, double linear, double cubic, const Tensor& y) {
    return {.x = x.const_data_ptr(),
            .normal = normal,
            .linear = float(linear),
            .cubic = float(cubic),
            .y = y.mutable_data_ptr()};
}

Tensor activated(const Tensor& x, bool normal, double linear, double cubic) {
    const char* op = "activated";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto forward = cpu_kernels().elementwise.activation[int(kernel_dtype(x.scalar_type(), op))].forward;
    check_coefficients(linear, cubic, op);
    const Tensor dense = x.contiguous(), y = at::empty(x.sizes(), x.options());
    const ActivationArgs args = activation_args(dense, normal, linear, cubic, y);
    at::parallel_for(0, x.numel(), kActivatedValues,
                     [&](int64_t first, int64_t last) { forward(args, first, last); });
    return y;
}

Tensor activated_backward(const Tensor& grad, const Tensor& x, bool normal, double linear, double cubic) {
    const char* op = "activated_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto backward =
        cpu_kernels().elementwise.activation[int(kernel_dtype(x.scalar_type(), op))].backward;
    check_coefficients(linear, cubic, op);
    check_like(grad, x, op, "grad");
    TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must be ", x.sizes(), " like x, found ",
                      grad.sizes());
    const Tensor dense = x.contiguous(), dy = grad.contiguous(), dx = at::empty(x.sizes(), x.options());
    ActivationArgs args = activation_args(dense, normal, linear, cubic, dx);
    args.dy = dy.const_data_ptr();
    at::parallel_for(0, x.numel(), kActivatedValues,
                     [&](int64_t first, int64_t last) { backward(args, first, last); });
    return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("activated", &activated);
    m.impl("activated_backward", &activated_backward);
}

}  // namespace elementwise
}  // namespace peftcore
