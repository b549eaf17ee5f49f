// Argument checks of cross_entropy_rows_ and linear_cross_entropy_rows. Schema: peftcore/ops/cross_entropy.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/check.h"

namespace peftcore {
namespace cross_entropy {

// Label smoothing, scale and soft cap of the logits, and the factor of the z-loss.
struct CrossEntropySettings {
    double smoothing, scale, cap, z_loss;
};

inline CrossEntropySettings checked_settings(at::ArrayRef<double> settings, const char* op) {
    TORCH_CHECK_VALUE(settings.size() == 4, op, ": settings must be 4 numbers, found ", settings.size());
    const CrossEntropySettings parsed{settings[0], settings[1], settings[2], settings[3]};
    TORCH_CHECK_VALUE(parsed.smoothing >= 0 && parsed.smoothing <= 1, op,
                      ": label_smoothing must be from 0 to 1, found ", parsed.smoothing);
    TORCH_CHECK_VALUE(parsed.cap >= 0, op, ": soft_cap must be positive, or 0 for none, found ", parsed.cap);
    return parsed;
}

inline void check_labels(const at::Tensor& labels, const std::optional<at::Tensor>& class_weight,
                         const std::optional<at::Tensor>& grad_scale, int64_t rows, int64_t classes,
                         const at::Device& device, const char* op) {
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, op, ": labels must be torch.int64, found ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == rows, op, ": labels must be [", rows,
                      "], found ", labels.sizes());
    TORCH_CHECK_VALUE(labels.device() == device, op, ": labels must be on ", device, ", found ",
                      labels.device());
    if (class_weight.has_value()) {
        check_tensor(*class_weight, at::kFloat, device, op, "class_weight");
        TORCH_CHECK_VALUE(class_weight->dim() == 1 && class_weight->size(0) == classes, op,
                          ": class_weight must be [", classes, "], found ", class_weight->sizes());
    }
    if (grad_scale.has_value()) {
        check_tensor(*grad_scale, at::kFloat, device, op, "grad_scale");
        TORCH_CHECK_VALUE(grad_scale->numel() == 1, op, ": grad_scale must be one value of torch.float32, ",
                          "found ", grad_scale->scalar_type(), " ", grad_scale->sizes());
    }
}

inline void check_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                const std::optional<at::Tensor>& class_weight,
                                const std::optional<at::Tensor>& grad_scale, const char* op) {
    kernel_dtype(logits.scalar_type(), op);
    TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must be [rows, classes], found ",
                      logits.sizes());
    TORCH_CHECK_VALUE(logits.is_contiguous(), op, ": logits must be contiguous, found strides ",
                      logits.strides());
    check_labels(labels, class_weight, grad_scale, logits.size(0), logits.size(1), logits.device(), op);
}

}  // namespace cross_entropy
}  // namespace peftcore
