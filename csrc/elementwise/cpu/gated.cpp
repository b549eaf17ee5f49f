// gated and its gradients on CPU. Schemas and formulas: peftcore/ops/gated.py.
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

constexpr int64_t kGatedValues = 8192;  // of a task
constexpr int64_t kGatedRow = 1024;

// kernel(args, first row, last row) for all values, as rows of kGatedRow values and a last, shorter one: the operator
// takes value by value, so that shapes do not matter.
template <typename Kernel>
void for_values(const GateArgs& args, int64_t count, int64_t itemsize, const Kernel& kernel) {
    const int64_t rows = count / kGatedRow, rest = count % kGatedRow;
    at::parallel_for(0, rows, kGatedValues / kGatedRow,
                     [&](int64_t first, int64_t last) { kernel(args, first, last); });
    if (rest == 0) return;
    const int64_t offset = rows * kGatedRow * itemsize;
    const auto from = [&](const void* p) { return p ? static_cast<const char*>(p) + offset : nullptr; };
    const auto to = [&](void* p) { return p ? static_cast<char*>(p) + offset : nullptr; };
    GateArgs last = args;
    last.gate = from(args.gate), last.up = from(args.up), last.dy = from(args.dy);
    last.y = to(args.y), last.dgate = to(args.dgate), last.dup = to(args.dup);
    last.columns = last.stride = rest;
    kernel(last, 0, 1);
}

Tensor gated(const Tensor& gate, const Tensor& up, double linear, double cubic) {
    const char* op = "gated";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto forward = cpu_kernels().elementwise.gate[int(kernel_dtype(gate.scalar_type(), op))].forward;
    check_gated(gate, up, linear, cubic, op);
    const Tensor g = gate.contiguous(), u = up.contiguous(), y = at::empty(gate.sizes(), gate.options());
    const GateArgs args{.gate = g.const_data_ptr(),
                        .up = u.const_data_ptr(),
                        .columns = kGatedRow,
                        .stride = kGatedRow,
                        .linear = float(linear),
                        .cubic = float(cubic),
                        .rounded = true,
                        .y = y.mutable_data_ptr()};
    for_values(args, gate.numel(), gate.element_size(), forward);
    return y;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                          double linear, double cubic) {
    const char* op = "gated_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto backward = cpu_kernels().elementwise.gate[int(kernel_dtype(gate.scalar_type(), op))].backward;
    check_gated_gradient(grad, gate, up, linear, cubic, op);
    const Tensor g = gate.contiguous(), u = up.contiguous(), dy = grad.contiguous();
    const Tensor dgate = at::empty(gate.sizes(), gate.options()),
                 dup = at::empty(gate.sizes(), gate.options());
    const GateArgs args{.gate = g.const_data_ptr(),
                        .up = u.const_data_ptr(),
                        .columns = kGatedRow,
                        .stride = kGatedRow,
                        .linear = float(linear),
                        .cubic = float(cubic),
                        .rounded = true,
                        .dy = dy.const_data_ptr(),
                        .dgate = dgate.mutable_data_ptr(),
                        .dup = dup.mutable_data_ptr()};
    for_values(args, gate.numel(), gate.element_size(), backward);
    return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("gated", &gated);
    m.impl("gated_backward", &gated_backward);
}

}  // namespace elementwise
}  // namespace peftcore
