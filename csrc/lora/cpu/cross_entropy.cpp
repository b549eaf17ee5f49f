// cross_entropy_rows_ on CPU. Schema and formula: peftcore/ops/cross_entropy.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "lora/cross_entropy_arguments.h"

namespace peftcore {
namespace lora {
namespace {

using at::Tensor;

constexpr int64_t kLogitsPerTask = 8192;  // each with two exponentials

Tensor cross_entropy_rows(const Tensor& logits, const Tensor& labels,
                          const std::optional<Tensor>& class_weight, const std::optional<Tensor>& grad_scale,
                          at::ArrayRef<double> settings, int64_t ignore_index, bool gradient) {
    const char* op = "cross_entropy_rows_";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_cross_entropy(logits, labels, class_weight, grad_scale, op);
    const CrossEntropySettings numbers = checked_settings(settings, op);
    const int64_t rows = logits.size(0), columns = logits.size(1);
    const Tensor found = at::empty({3, rows}, logits.options().dtype(at::kFloat)),
                 target = labels.contiguous(),
                 weights = class_weight.has_value() ? class_weight->contiguous() : Tensor();
    float* out = found.mutable_data_ptr<float>();
    const CrossEntropyArgs args{
        .x = logits.mutable_data_ptr(),
        .columns = columns,
        .labels = target.const_data_ptr<int64_t>(),
        .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
        .total_weight = weights.defined() ? weights.sum(at::kDouble).item<double>() : double(columns),
        .smoothing = numbers.smoothing,
        .z_loss = numbers.z_loss,
        .scale = float(numbers.scale),
        .cap = float(numbers.cap),
        .grad_scale = grad_scale.has_value() ? grad_scale->const_data_ptr<float>() : nullptr,
        .ignore_index = ignore_index,
        .gradient = gradient,
        .loss = out,
        .lse = out + rows,
        .entropy = out + 2 * rows};
    const auto kernel = cpu_kernels().lora.cross_entropy[int(kernel_dtype(logits.scalar_type(), op))];
    at::parallel_for(0, rows, ceil_div(kLogitsPerTask, columns),
                     [&](int64_t first, int64_t last) { kernel(args, first, last); });
    return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("cross_entropy_rows_", &cross_entropy_rows); }

}  // namespace lora
}  // namespace peftcore
