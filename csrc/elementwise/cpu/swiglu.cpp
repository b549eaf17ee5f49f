// swiglu and its gradient on CPU. Schemas and formulas: peftcore/ops/swiglu.py.
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

using at::Tensor;

constexpr int64_t kGatesPerTask = 8192;  // each with an exponential

template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
    at::parallel_for(0, columns == 0 ? 0 : rows, ceil_div(kGatesPerTask, std::max<int64_t>(1, columns)),
                     body);
}

Tensor swiglu(const Tensor& x) {
    const char* op = "swiglu";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto forward = cpu_kernels().elementwise.gate[int(kernel_dtype(x.scalar_type(), op))].forward;
    check_swiglu(x, op);
    const Tensor rows = matrix(x), y = at::empty(with_last(x, x.size(-1) / 2), x.options());
    const int64_t columns = x.size(-1) / 2;
    const auto* values = static_cast<const char*>(rows.const_data_ptr());
    const GateArgs args{.gate = values,
                        .up = values + columns * x.element_size(),
                        .columns = columns,
                        .stride = 2 * columns,
                        .y = y.mutable_data_ptr()};
    for_rows(rows.size(0), args.columns, [&](int64_t first, int64_t last) { forward(args, first, last); });
    return y;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x) {
    const char* op = "swiglu_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto backward = cpu_kernels().elementwise.gate[int(kernel_dtype(x.scalar_type(), op))].backward;
    check_swiglu_gradient(grad, x, op);
    const Tensor rows = matrix(x), dy = matrix(grad), dx = at::empty(x.sizes(), x.options());
    const int64_t columns = x.size(-1) / 2, to_up = columns * x.element_size();
    const auto* values = static_cast<const char*>(rows.const_data_ptr());
    auto* slopes = static_cast<char*>(dx.mutable_data_ptr());
    const GateArgs args{.gate = values,
                        .up = values + to_up,
                        .columns = columns,
                        .stride = 2 * columns,
                        .dy = dy.const_data_ptr(),
                        .dgate = slopes,
                        .dup = slopes + to_up};
    for_rows(rows.size(0), args.columns, [&](int64_t first, int64_t last) { backward(args, first, last); });
    return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("swiglu", &swiglu);
    m.impl("swiglu_backward", &swiglu_backward);
}

}  // namespace elementwise
}  // namespace peftcore
