// lora_linear_per_sample on CPU: an adapter for each sample. Schema: peftcore/ops/lora.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "common/workspace.h"
#include "cpu/kernels.h"
#include "lora/cpu/frozen.h"
#include "lora/cpu/skinny.h"
#include "lora/cpu/thin.h"

namespace peftcore {
namespace lora {
namespace {

const RowKernels& row_kernels(at::ScalarType dtype, const char* op) {
    return cpu_kernels().lora.row[int(kernel_dtype(dtype, op))];
}

// One adapter, and the first rows of the samples that use it.
struct Sharing {
    const Tensor *a, *b;
    float scale;
    std::vector<int64_t> samples;
};

// An adapter with fewer rows is done by one thread. Threads that divide each product synchronize four times, and with
// 64 adapters of 16 rows they wait as long as they multiply.
constexpr int64_t kShareFrom = 512;

// y += scale x aᵀ bᵀ in one thread, for the rows of these samples, `count` each.
void add_samples(const ThinKernels& kernels, const Tensor& x, const Tensor& y, const Sharing& adapter,
                 const Tensor& a, const Tensor& b, int64_t count, const char* op) {
    const int64_t r = a.size(0), columns = x.size(1), out_features = y.size(1);
    const int64_t width = filled_up(r, kWidthMultiple), out_width = filled_up(out_features, kWidthMultiple);
    const Arrangement &for_down = kernels.arrangement, &for_up = kernels.plain;
    const int64_t wide_bytes = filled_up(4 * (r * std::max(columns, out_features) + kRowPadding), 64),
                  units_bytes =
                      filled_up(std::max(ceil_div(columns, for_down.pair) * width * for_down.unit_size,
                                         ceil_div(r, for_up.pair) * out_width * for_up.unit_size),
                                64);
    char* memory = static_cast<char*>(
        workspace(wide_bytes + units_bytes + 4 * r * count * int64_t(adapter.samples.size())));
    float *wide = reinterpret_cast<float*>(memory),
          *s = reinterpret_cast<float*>(memory + wide_bytes + units_bytes);
    char* units = memory + wide_bytes;
    row_kernels(a.scalar_type(), op).widen(a.const_data_ptr(), r * columns, wide);
    for_down.arrange(wide, 1, columns, columns, r, width, units);
    for (size_t i = 0; i < adapter.samples.size(); ++i)
        kernels.down({.x = static_cast<const char*>(x.const_data_ptr()) +
                           adapter.samples[i] * columns * x.element_size(),
                      .columns = columns,
                      .right = units,
                      .width = width,
                      .r = r,
                      .factor = adapter.scale,
                      .keep = {},
                      .s = s + int64_t(i) * count * r},
                     0, count);
    row_kernels(b.scalar_type(), op).widen(b.const_data_ptr(), r * out_features, wide);
    for_up.arrange(wide, 1, r, r, out_features, out_width, units);
    for (size_t i = 0; i < adapter.samples.size(); ++i)
        kernels.up({.y = static_cast<char*>(y.mutable_data_ptr()) +
                         adapter.samples[i] * out_features * y.element_size(),
                    .columns = out_features,
                    .left = s + int64_t(i) * count * r,
                    .inner = r,
                    .right = reinterpret_cast<const float*>(units),
                    .width = out_width,
                    .keep = {}},
                   0, count);
}

// y += scale x aᵀ bᵀ by all threads.
void add_shared(const ThinKernels& kernels, const Tensor& x, const Tensor& y, const Sharing& adapter,
                int64_t count) {
    const Factor down_right = arranged_factor(kernels.arrangement, floats(*adapter.a), true),
                 up_right = arranged_factor(kernels.plain, floats(*adapter.b), true);
    const Tensor s = at::empty({count, adapter.a->size(0)}, x.options().dtype(at::kFloat));
    for (const int64_t first : adapter.samples) {
        down(kernels, down_args(x.narrow(0, first, count), down_right, adapter.scale, {}, s), count);
        up(kernels, y.narrow(0, first, count), s, up_right, {});
    }
}

// The rows [index] of x by adapters with factors that are not arranged; all of one dtype.
void add_rows(const Tensor& x, const Tensor& y, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
              at::ArrayRef<double> scales, const std::vector<std::pair<int64_t, int64_t>>& rows,
              const char* op) {
    const RowKernels& of_x = row_kernels(x.scalar_type(), op);
    const int64_t columns = x.size(1), out_features = y.size(1);
    at::parallel_for(0, int64_t(rows.size()), 1, [&](int64_t first, int64_t last) {
        std::vector<float> wide(size_t(columns + kRowPadding)), s, delta(size_t(out_features + kRowPadding));
        for (int64_t i = first; i < last; ++i) {
            const auto [row, contiguous_index] = rows[size_t(i)];
            const Tensor &down = a[size_t(contiguous_index)], &up = b[size_t(contiguous_index)];
            const int64_t r = down.size(0);
            s.resize(size_t(r + kRowPadding));
            of_x.widen(static_cast<const char*>(x.const_data_ptr()) + row * columns * x.element_size(),
                       columns, wide.data());
            row_kernels(down.scalar_type(), op)
                .multiply(wide.data(), down.const_data_ptr(), columns, r, s.data());
            for (int64_t j = 0; j < r; ++j) s[size_t(j)] *= float(scales[size_t(contiguous_index)]);
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
    const Tensor contiguous_index = index.contiguous();
    const int64_t* numbers = contiguous_index.const_data_ptr<int64_t>();
    std::vector<Sharing> adapters(a.size());
    for (int64_t i = 0; i < samples; ++i) {
        TORCH_CHECK_VALUE(numbers[i] >= -1 && numbers[i] < int64_t(a.size()), op,
                          ": index must be -1 (none) to ", int64_t(a.size()) - 1, ", found ", numbers[i]);
        if (numbers[i] >= 0) adapters[size_t(numbers[i])].samples.push_back(i * count);
    }
    if (y.numel() == 0) return y.view(with_last(x, out_features));
    const ThinKernels& kernels = cpu_kernels().lora.thin[int(kernel_dtype(x.scalar_type(), op))];
    std::vector<Tensor> plain_a(a.size()), plain_b(a.size());
    std::vector<std::pair<int64_t, int64_t>> few;
    std::vector<size_t> alone, shared;
    for (size_t i = 0; i < a.size(); ++i) {
        Sharing& adapter = adapters[i];
        adapter.a = &a[i];
        adapter.b = &b[i];
        adapter.scale = float(scales[i]);
        const int64_t rows = count * int64_t(adapter.samples.size());
        if (rows == 0 || a[i].size(0) == 0) continue;
        if (rows >= kShareFrom) {
            shared.push_back(i);
            continue;
        }
        plain_a[i] = plain_factor(a[i]);
        plain_b[i] = plain_factor(b[i]);
        if (rows >= kArrangeEachFrom) {
            alone.push_back(i);
            continue;
        }
        for (const int64_t first : adapter.samples)
            for (int64_t row = first; row < first + count; ++row) few.emplace_back(row, int64_t(i));
    }
    if (int64_t(alone.size()) < threads_here()) {
        shared.insert(shared.end(), alone.begin(), alone.end());
    } else {
        at::parallel_for(0, int64_t(alone.size()), 1, [&](int64_t first, int64_t last) {
            for (; first < last; ++first) {
                const size_t i = alone[size_t(first)];
                add_samples(kernels, flat, y, adapters[i], plain_a[i], plain_b[i], count, op);
            }
        });
    }
    for (const size_t i : shared) add_shared(kernels, flat, y, adapters[i], count);
    add_rows(flat, y, plain_a, plain_b, scales, few, op);
    return y.view(with_last(x, out_features));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("lora_linear_per_sample", &lora_linear_per_sample); }

}  // namespace lora
}  // namespace peftcore
