// activated, its gradient and dropout on CPU. Schemas and formulas: peftcore/ops/activated.py and peftcore/ops/dropout.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "lora/arguments.h"
#include "lora/norm_arguments.h"

namespace peftcore {
namespace lora {
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
    const auto forward = cpu_kernels().lora.activation[int(kernel_dtype(x.scalar_type(), op))].forward;
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
    const auto backward = cpu_kernels().lora.activation[int(kernel_dtype(x.scalar_type(), op))].backward;
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

Tensor dropout(const Tensor& x, double p, const std::optional<Tensor>& seed) {
    const char* op = "dropout";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto rows_of = cpu_kernels().lora.dropped[int(kernel_dtype(x.scalar_type(), op))];
    TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension, found a scalar");
    const Dropout drop = dropout_of(p, seed, op);
    const Tensor rows = matrix(x), y = at::empty(x.sizes(), x.options());
    const DropArgs args{.x = rows.const_data_ptr(),
                        .columns = rows.size(1),
                        .dropout = drop,
                        .factor = factor_of(1, drop),
                        .y = y.mutable_data_ptr()};
    at::parallel_for(0, rows.size(0), ceil_div(kValuesPerTask, std::max<int64_t>(1, args.columns)),
                     [&](int64_t first, int64_t last) { rows_of(args, first, last); });
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("activated", &activated);
    m.impl("activated_backward", &activated_backward);
    m.impl("dropout", &dropout);
}

}  // namespace lora
}  // namespace peftcore
