// Argument checks of dropout, shared by all operators that have it.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/check.h"
#include "common/dropout.h"

namespace peftcore {

// `device`: where kernels can read the seed themselves; without it the seed must be on the CPU.
inline Dropout checked_dropout(double p, const std::optional<at::Tensor>& seed, const char* op,
                               const std::optional<c10::Device>& device = {}) {
    TORCH_CHECK_VALUE(p >= 0 && p < 1, op, ": dropout_p must be in [0, 1), found ", p);
    TORCH_CHECK_VALUE(seed.has_value() || p == 0, op, ": dropout_p=", p, " needs a seed, found none");
    Dropout dropout;
    if (!seed.has_value()) return dropout;
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, op, ": seed must be ", at::kLong, ", found ",
                     seed->scalar_type());
    const bool in_kernels = device.has_value() && seed->device() == *device;
    TORCH_CHECK_VALUE(in_kernels || seed->device().is_cpu(), op, ": seed must be on cpu",
                      device.has_value() ? " or " + device->str() : "", ", found ", seed->device());
    TORCH_CHECK_VALUE(seed->numel() == 1, op, ": seed must hold 1 element, found ", seed->numel());
    dropout.threshold = uint32_t(std::min(std::nearbyint(p * 65536), 65535.0));
    dropout.seed = seed->const_data_ptr<int64_t>();
    return in_kernels ? dropout : with_key(dropout);
}

// c = scale / (1 - p), with the p that the threshold stands for.
inline float dropout_factor(double scale, const Dropout& dropout) {
    return float(scale * 65536 / (65536 - dropout.threshold));
}

}  // namespace peftcore
