// scaled and its gradient on CPU. Schemas and formulas: peftcore/ops/scaled.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/check.h"
#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"

namespace peftcore {
namespace elementwise {
namespace {

using at::Tensor;

// Sums over the rows of x are computed for groups of rows and added in order: they depend on shapes only, not on the
// number of threads.
constexpr int64_t kScaledGroupRows = 64, kPartColumns = 1024;
constexpr int64_t kFilled = 16;

void check_gain(const Tensor& x, const Tensor& g, const char* op) {
    TORCH_CHECK_TYPE(known_dtype(g.scalar_type()) || g.scalar_type() == at::kDouble, op,
                     ": g must be a 16-, 32- or 64-bit floating-point tensor, found ", g.scalar_type());
    TORCH_CHECK_VALUE(g.device() == x.device(), op, ": g must be on ", x.device(), " like x, found ",
                      g.device());
    TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension, found a scalar");
    TORCH_CHECK_VALUE(g.dim() == 1 && g.size(0) == x.size(-1), op, ": g must be [", x.size(-1),
                      "] for x, found ", g.sizes());
}

Tensor scaled(const Tensor& x, const Tensor& g) {
    const char* op = "scaled";
    const at::AutoDispatchBelowADInplaceOrView below;
    const ScaleKernels& kernels = cpu_kernels().elementwise.scale[int(kernel_dtype(x.scalar_type(), op))];
    check_gain(x, g, op);
    const Tensor rows = matrix(x), gain = floats(g), y = at::empty(x.sizes(), x.options());
    const ScaleArgs args{.x = rows.const_data_ptr(),
                         .columns = rows.size(1),
                         .g = gain.const_data_ptr<float>(),
                         .y = y.mutable_data_ptr()};
    at::parallel_for(0, rows.size(0), ceil_div(kValuesPerTask, std::max<int64_t>(1, args.columns)),
                     [&](int64_t first, int64_t last) { kernels.scale(args, first, last); });
    return y;
}

std::tuple<Tensor, Tensor> scaled_backward(const Tensor& grad, const Tensor& x, const Tensor& g,
                                           std::array<bool, 2> needs) {
    const char* op = "scaled_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const ScaleKernels& kernels = cpu_kernels().elementwise.scale[int(kernel_dtype(x.scalar_type(), op))];
    check_gain(x, g, op);
    check_like(grad, x, op, "grad");
    TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must be ", x.sizes(), " like x, found ",
                      grad.sizes());
    const Tensor rows = matrix(x), dy = matrix(grad), gain = floats(g);
    const Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
    const int64_t columns = rows.size(1), stride = filled_up(columns, kFilled);
    const int64_t groups = ceil_div(rows.size(0), kScaledGroupRows), parts = ceil_div(columns, kPartColumns);
    const Tensor sums = at::empty({needs[1] ? groups * stride : 0}, gain.options());
    float* all = needs[1] ? sums.mutable_data_ptr<float>() : nullptr;
    const auto task = [&](int64_t group, int64_t begin) {
        const ScaleBackwardArgs args{.dy = dy.const_data_ptr(),
                                     .x = rows.const_data_ptr(),
                                     .columns = columns,
                                     .g = gain.const_data_ptr<float>(),
                                     .first_column = begin,
                                     .last_column = std::min(begin + kPartColumns, columns),
                                     .dx = needs[0] ? dx.mutable_data_ptr() : nullptr,
                                     .sums = all == nullptr ? nullptr : all + group * stride};
        if (args.sums != nullptr)
            std::fill(args.sums + begin, args.sums + filled_up(args.last_column, kFilled), 0.0f);
        const int64_t first = group * kScaledGroupRows;
        kernels.backward(args, first, std::min(first + kScaledGroupRows, rows.size(0)));
    };
    at::parallel_for(
        0, groups * parts,
        ceil_div(kValuesPerTask, kScaledGroupRows * std::clamp<int64_t>(stride, 1, kPartColumns)),
        [&](int64_t first, int64_t last) {
            for (; first < last; ++first) task(first / parts, first % parts * kPartColumns);
        });
    const Tensor dg = at::empty({needs[1] ? columns : 0}, gain.options());
    float* total = dg.mutable_data_ptr<float>();
    at::parallel_for(0, dg.size(0), ceil_div(kValuesPerTask, std::max<int64_t>(1, groups)),
                     [&](int64_t first, int64_t last) {
                         std::fill(total + first, total + last, 0.0f);
                         for (int64_t group = 0; group < groups; ++group)
                             for (int64_t n = first; n < last; ++n) total[n] += all[group * stride + n];
                     });
    return {dx, dg.to(g.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("scaled", &scaled);
    m.impl("scaled_backward", &scaled_backward);
}

}  // namespace elementwise
}  // namespace peftcore
