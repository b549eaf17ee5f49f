// lora_linear_per_sample on CPU: an adapter for each sample. Schema: peftcore/ops/lora.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "cpu/kernels.h"
#include "lora/cpu/few_rows.h"
#include "lora/cpu/frozen.h"
#include "lora/cpu/thin.h"

namespace peftcore {
namespace lora {
namespace {

const RowKernels& row_kernels(at::ScalarType dtype, const char* op) {
    return cpu_kernels().lora.row[int(kernel_dtype(dtype, op))];
}

constexpr int64_t kRoom = 16;  // see RowKernels

// The rows [index] of x by adapters whose factors are not arranged; all of one dtype.
void add_rows(const Tensor& x, const Tensor& y, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
              at::ArrayRef<double> scales, const std::vector<std::pair<int64_t, int64_t>>& rows,
              const char* op) {
    const RowKernels& of_x = row_kernels(x.scalar_type(), op);
    const int64_t columns = x.size(1), out_features = y.size(1);
    at::parallel_for(0, int64_t(rows.size()), 1, [&](int64_t first, int64_t last) {
        std::vector<float> wide(size_t(columns + kRoom)), s, delta(size_t(out_features + kRoom));
        for (int64_t i = first; i < last; ++i) {
            const auto [row, which] = rows[size_t(i)];
            const Tensor &down = a[size_t(which)], &up = b[size_t(which)];
            const int64_t r = down.size(0);
            s.resize(size_t(r + kRoom));
            of_x.widen(static_cast<const char*>(x.const_data_ptr()) + row * columns * x.element_size(),
                       columns, wide.data());
            row_kernels(down.scalar_type(), op)
                .multiply(wide.data(), down.const_data_ptr(), columns, r, s.data());
            for (int64_t j = 0; j < r; ++j) s[size_t(j)] *= float(scales[size_t(which)]);
            row_kernels(up.scalar_type(), op)
                .multiply(s.data(), up.const_data_ptr(), r, out_features, delta.data());
            of_x.add(delta.data(), out_features,
                     static_cast<char*>(y.mutable_data_ptr()) + row * out_features * y.element_size());
        }
    });
}

Tensor lora_linear_per_sample(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                              const std::optional<Tensor>& bias, at::TensorList a, at::TensorList b,
                              at::ArrayRef<double> scales, const Tensor& index) {
    const char* op = "lora_linear_per_sample";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, bias, op);
    const int64_t out_features = weight.rows();
    check_adapters(x, a, b, scales, index, out_features, op);
    const Tensor flat = matrix(x);
    const Tensor y = frozen_linear(flat, weight, bias);
    const int64_t samples = x.size(0), count = samples == 0 ? 0 : flat.size(0) / samples;
    const Tensor which = index.contiguous();
    const int64_t* of = which.const_data_ptr<int64_t>();
    std::vector<int64_t> total(a.size());
    for (int64_t i = 0; i < samples; ++i) {
        TORCH_CHECK_VALUE(of[i] >= -1 && of[i] < int64_t(a.size()), op, ": index must be -1 (none) to ",
                          int64_t(a.size()) - 1, ", found ", of[i]);
        if (of[i] >= 0) total[size_t(of[i])] += count;
    }
    if (y.numel() == 0) return y.view(with_last(x, out_features));
    const ThinKernels& kernels = cpu_kernels().lora.thin[int(kernel_dtype(x.scalar_type(), op))];
    std::vector<Tensor> few_a(a.size()), few_b(a.size());
    std::vector<std::pair<int64_t, int64_t>> few;
    for (size_t i = 0; i < a.size(); ++i) {
        const int64_t r = a[i].size(0);
        if (total[i] == 0 || r == 0) continue;
        if (total[i] < kArrangeFrom) {
            few_a[i] = plain_factor(a[i]);
            few_b[i] = plain_factor(b[i]);
        }
        Factor down_right, up_right;
        if (total[i] >= kArrangeFrom) {
            down_right = arranged_factor(kernels.arrangement, floats(a[i]), true);
            up_right = arranged_factor(kernels.plain, floats(b[i]), true);
        }
        for (int64_t sample = 0; sample < samples; ++sample) {
            if (of[sample] != int64_t(i)) continue;
            const int64_t first = sample * count;
            if (total[i] < kArrangeFrom) {
                for (int64_t row = first; row < first + count; ++row) few.emplace_back(row, int64_t(i));
            } else {
                const Tensor s = at::empty({count, r}, x.options().dtype(at::kFloat));
                down(kernels, down_args(flat.narrow(0, first, count), down_right, float(scales[i]), {}, s),
                     count);
                up(kernels, y.narrow(0, first, count), s, up_right, {});
            }
        }
    }
    add_rows(flat, y, few_a, few_b, scales, few, op);
    return y.view(with_last(x, out_features));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("lora_linear_per_sample", &lora_linear_per_sample); }

}  // namespace lora
}  // namespace peftcore
