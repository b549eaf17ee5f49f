// cross_entropy_rows_ on CUDA. Schema and formula: peftcore/ops/cross_entropy.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "cross_entropy/arguments.h"
#include "cross_entropy/cuda/cross_entropy_cuda.h"

namespace peftcore {
namespace cross_entropy {
namespace {

at::Tensor cross_entropy_rows_cuda(const at::Tensor& logits, const at::Tensor& labels,
                                   const std::optional<at::Tensor>& class_weight,
                                   const std::optional<at::Tensor>& grad_scale, at::ArrayRef<double> settings,
                                   int64_t ignore_index, bool gradient) {
    const char* op = "cross_entropy_rows_";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_cross_entropy(logits, labels, class_weight, grad_scale, op);
    const CrossEntropySettings numbers = checked_settings(settings, op);
    const c10::DeviceGuard guard(logits.device());
    const at::Tensor statistics = at::empty({3, logits.size(0)}, logits.options().dtype(at::kFloat)),
                     target = labels.contiguous(),
                     weights = class_weight.has_value() ? class_weight->contiguous() : at::Tensor(),
                     total = weights.defined() ? weights.sum() : at::Tensor();
    const CrossEntropyCall call{
        .x = logits.mutable_data_ptr(),
        .dtype = kernel_dtype(logits.scalar_type(), op),
        .rows = logits.size(0),
        .columns = logits.size(1),
        .labels = target.const_data_ptr<int64_t>(),
        .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
        .total_weight = total.defined() ? total.const_data_ptr<float>() : nullptr,
        .smoothing = float(numbers.smoothing),
        .z_loss = float(numbers.z_loss),
        .scale = float(numbers.scale),
        .cap = float(numbers.cap),
        .grad_scale = grad_scale.has_value() ? grad_scale->const_data_ptr<float>() : nullptr,
        .ignore_index = ignore_index,
        .gradient = gradient,
        .out = statistics.mutable_data_ptr<float>()};
    check_launch(peftcore_cross_entropy_rows(&call, current_cuda_stream(logits.device())), op);
    return statistics;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("cross_entropy_rows_",
           &OrReference<"peftcore::cross_entropy_rows_", "", &cross_entropy_rows_cuda>::call);
}

}  // namespace cross_entropy
}  // namespace peftcore
