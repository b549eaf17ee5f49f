// rms_norm and its gradients on CPU. Schemas and formulas: peftcore/ops/rms_norm.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "norms/arguments.h"

namespace peftcore {
namespace norms {
namespace {

// offset + weight in fp32, filled up with zeros.
Tensor padded_gain(const Tensor& weight, double offset) {
    const Tensor g = at::zeros({filled_up(weight.size(0), kNormPadding)}, weight.options().dtype(at::kFloat));
    const Tensor values = floats(weight);
    const float* from = values.const_data_ptr<float>();
    float* to = g.mutable_data_ptr<float>();
    for (int64_t n = 0; n < weight.size(0); ++n) to[n] = float(offset) + from[n];
    return g;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                                    bool rounded) {
    const char* op = "rms_norm";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto forward = cpu_kernels().norms.rms_norm[int(kernel_dtype(x.scalar_type(), op))].forward;
    check_norm(x, weight, op);
    const Tensor rows = matrix(x), g = padded_gain(weight, offset), y = at::empty(x.sizes(), x.options());
    const Tensor scale = at::empty({rows.size(0)}, g.options());
    const RmsNormArgs args{.x = rows.const_data_ptr(),
                           .columns = rows.size(1),
                           .g = g.const_data_ptr<float>(),
                           .eps = float(eps),
                           .rounded = rounded,
                           .y = y.mutable_data_ptr(),
                           .scale = scale.mutable_data_ptr<float>()};
    at::parallel_for(0, rows.size(0), ceil_div(kValuesPerTask, std::max<int64_t>(1, args.columns)),
                     [&](int64_t first, int64_t last) { forward(args, first, last); });
    return {y, scale};
}

// Sums for the weight are computed for groups of rows and added in order: they depend on shapes only, not on the number
// of threads.
constexpr int64_t kNormGroupRows = 16;

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& scale, double offset, bool rounded,
                                             std::array<bool, 2> needs) {
    const char* op = "rms_norm_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto backward = cpu_kernels().norms.rms_norm[int(kernel_dtype(x.scalar_type(), op))].backward;
    check_norm_gradient(grad, x, weight, scale, op);
    const Tensor rows = matrix(x), dy = matrix(grad), g = padded_gain(weight, offset),
                 factors = scale.contiguous();
    const Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
    const int64_t columns = rows.size(1), groups = needs[1] ? ceil_div(rows.size(0), kNormGroupRows) : 0;
    const int64_t stride = g.size(0);
    const Tensor sums = at::zeros({groups * stride}, g.options());
    RmsNormBackwardArgs args{.dy = dy.const_data_ptr(),
                             .x = rows.const_data_ptr(),
                             .columns = columns,
                             .g = g.const_data_ptr<float>(),
                             .scale = factors.const_data_ptr<float>(),
                             .rounded = rounded,
                             .dx = needs[0] ? dx.mutable_data_ptr() : nullptr,
                             .sums = nullptr};
    const int64_t rows_per_task = ceil_div(kValuesPerTask, std::max<int64_t>(1, columns));
    if (!needs[1]) {
        at::parallel_for(0, rows.size(0), rows_per_task,
                         [&](int64_t first, int64_t last) { backward(args, first, last); });
    } else {
        at::parallel_for(0, groups, ceil_div(rows_per_task, kNormGroupRows), [&](int64_t group, int64_t end) {
            for (; group < end; ++group) {
                RmsNormBackwardArgs part = args;
                part.sums = sums.mutable_data_ptr<float>() + group * stride;
                const int64_t first = group * kNormGroupRows;
                backward(part, first, std::min(first + kNormGroupRows, rows.size(0)));
            }
        });
    }
    const Tensor dweight = at::empty({needs[1] ? columns : 0}, g.options());
    std::vector<double> total(size_t(dweight.size(0)));
    const float* parts = sums.const_data_ptr<float>();
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t n = 0; n < columns; ++n) total[size_t(n)] += parts[group * stride + n];
    std::copy(total.begin(), total.end(), dweight.mutable_data_ptr<float>());
    return {dx, dweight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("rms_norm", &rms_norm);
    m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace norms
}  // namespace peftcore
