// lora_linear and its gradient on CPU. Schemas and formulas: peftcore/ops/lora.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "common/cpu_features.h"
#include "lora/arguments.h"
#include "lora/cpu/base.h"
#include "lora/cpu/dropout.h"
#include "lora/cpu/kernels.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kProductsPerTask = 1 << 17, kCountersPerTask = 1 << 12;

Kernels choose(Dtype dtype) {
    switch (cpu_level()) {
#if defined(PEFTCORE_HAVE_AVX512)
        case CpuLevel::kAmx:
#if defined(PEFTCORE_HAVE_AMX)
            if (dtype == Dtype::kBFloat16) return amx_kernels();
#endif
            [[fallthrough]];
        case CpuLevel::kAvx512:
#if defined(PEFTCORE_HAVE_AVX512BF16)
            if (dtype == Dtype::kBFloat16 && cpu_has_bf16_dot()) return avx512bf16_kernels();
#endif
            return avx512_kernels(dtype);
#endif
#if defined(PEFTCORE_HAVE_AVX2)
        case CpuLevel::kAvx2:
            return avx2_kernels(dtype);
#endif
        default:
            return portable_kernels(dtype);
    }
}

RowKernels choose_rows(Dtype dtype) {
    switch (cpu_level()) {
#if defined(PEFTCORE_HAVE_AVX512)
        case CpuLevel::kAmx:
        case CpuLevel::kAvx512:
            return avx512_row_kernels(dtype);
#endif
#if defined(PEFTCORE_HAVE_AVX2)
        case CpuLevel::kAvx2:
            return avx2_row_kernels(dtype);
#endif
        default:
            return portable_row_kernels(dtype);
    }
}

int64_t filled_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

// A factor [inner, outer] as units (see kernels.h).
struct Factor {
    Tensor memory;
    int64_t inner, width;
    void* units() const { return memory.mutable_data_ptr(); }
};

Factor arranged(const Kernels& kernels, const Tensor& from, bool transposed) {
    const int64_t rows = from.size(0), columns = from.size(1);
    const int64_t inner = transposed ? columns : rows, outer = transposed ? rows : columns;
    Factor factor{{}, ceil_div(inner, kernels.pair), ceil_div(outer, kWidthMultiple) * kWidthMultiple};
    factor.memory =
        at::empty({factor.inner * factor.width * kernels.unit_size}, from.options().dtype(at::kByte));
    kernels.arrange(from.const_data_ptr(), transposed ? 1 : columns, transposed ? columns : 1, inner, outer,
                    factor.width, factor.units());
    return factor;
}

// keep of x [rows, columns].
struct Kept {
    Tensor memory;
    Mask mask;
};

Kept kept(const Kernels& kernels, const Dropout& dropout, const Tensor& x) {
    if (dropout.threshold == 0) return {};
    const int64_t rows = x.size(0), counters = ceil_div(x.size(1), kColumnsPerCounter);
    const int64_t stride = ceil_div(counters, kCounters) * kCounters;
    Kept made{at::empty({rows, stride}, x.options().dtype(at::kByte)), {}};
    uint8_t* bits = made.memory.mutable_data_ptr<uint8_t>();
    at::parallel_for(0, rows, ceil_div(kCountersPerTask, stride), [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m) kernels.keep_bytes(dropout, m, 0, counters, bits + m * stride);
    });
    made.mask = {bits, stride};
    return made;
}

DownArgs down_args(const Tensor& x, const Factor& right, float factor, const Mask& keep, const Tensor& s) {
    return {x.const_data_ptr(), x.size(1), right.units(), right.width,
            s.size(1),          factor,    keep,          s.mutable_data_ptr()};
}

void down(const Kernels& kernels, const DownArgs& args, int64_t rows) {
    at::parallel_for(0, rows, ceil_div(kProductsPerTask, std::max<int64_t>(1, args.columns * args.r)),
                     [&](int64_t first, int64_t last) { kernels.down(args, first, last); });
}

// y += keep ∘ (s right).
void up(const Kernels& kernels, const Tensor& y, const Tensor& s, const Factor& right, const Mask& keep) {
    const int64_t r = s.size(1), inner = ceil_div(r, kernels.pair), columns = y.size(1);
    UpArgs args{y.mutable_data_ptr(), columns, s.const_data_ptr(), inner, 1, inner, right.units(),
                right.width,          keep};
    Factor units;  // s as such, where it is not made of them already
    if (r % kernels.pair != 0 || s.element_size() * kernels.pair != kernels.unit_size) {
        units = arranged(kernels, s, true);
        args.left = units.units();
        args.left_row = 1;
        args.left_inner = units.width;
    }
    const int64_t products = std::max<int64_t>(1, columns * inner * kernels.pair);
    at::parallel_for(0, y.size(0), ceil_div(kProductsPerTask, products),
                     [&](int64_t first, int64_t last) { kernels.up(args, first, last); });
}

// Sums over the rows of x are made by groups of rows, each in their order, and added in theirs: by the shapes
// alone, whatever the number of threads. `down`, if given, is of the same x and goes along, so that x comes
// from memory once.
constexpr int64_t kGroupRows = 256;
constexpr int64_t kAllSums = int64_t(1) << 23;  // of all groups: 32 MB; beyond, groups have more rows
constexpr int64_t kOwnSums = int64_t(1) << 17;  // of a task: they stay in the second cache

// out [r, columns] = leftᵀ (keep ∘ x); transposed: [columns, r].
void outer(const Kernels& kernels, const Tensor& x, const Tensor& left, const Tensor& out, bool transposed,
           const Mask& keep, const DownArgs* down_too) {
    const int64_t rows = x.size(0), columns = x.size(1), r = left.size(1);
    const Factor factor = arranged(kernels, left, false);
    const int64_t width = factor.width, filled = filled_up(columns, kColumnGrain);
    const int64_t most = std::max<int64_t>(1, kAllSums / (width * filled));
    const int64_t group_rows =
        filled_up(ceil_div(rows, std::min(most, ceil_div(rows, kGroupRows))), kRowGrain);
    const int64_t groups = ceil_div(rows, group_rows), threads = at::get_num_threads();
    int64_t part = filled_up(std::max<int64_t>(1, kOwnSums / width), kColumnGrain);
    if (groups < threads)
        part = std::min(part, filled_up(ceil_div(columns, ceil_div(threads, groups)), kColumnGrain));
    const int64_t parts = ceil_div(columns, part);
    if (down_too != nullptr && parts > 1) {
        down(kernels, *down_too, rows);
        down_too = nullptr;
    }
    const Tensor memory = at::empty({groups * width * filled}, out.options());
    float* all = memory.mutable_data_ptr<float>();
    const int64_t products = group_rows * std::min(part, columns) * r;
    at::parallel_for(0, groups * parts, ceil_div(kProductsPerTask, products),
                     [&](int64_t first, int64_t last) {
                         for (; first < last; ++first) {
                             const int64_t group = first / parts, begin = first % parts * part,
                                           end = std::min(begin + part, columns);
                             float* sums = all + group * width * filled + width * begin;
                             std::fill_n(sums, width * filled_up(end - begin, kColumnGrain), 0.0f);
                             const int64_t stop = std::min((group + 1) * group_rows, rows);
                             const OuterArgs args{x.const_data_ptr(),
                                                  columns,
                                                  factor.units(),
                                                  width,
                                                  r,
                                                  keep,
                                                  down_too != nullptr,
                                                  begin,
                                                  end,
                                                  sums};
                             for (int64_t m = group * group_rows; m < stop; m += kRowGrain) {
                                 const int64_t next = std::min(m + kRowGrain, stop);
                                 if (down_too != nullptr) kernels.down(*down_too, m, next);
                                 kernels.outer(args, m, next);
                             }
                         }
                     });
    float* result = out.mutable_data_ptr<float>();
    const int64_t out_row = transposed ? 1 : columns, out_column = transposed ? r : 1;
    at::parallel_for(0, ceil_div(columns, kColumnGrain),
                     ceil_div(kProductsPerTask, kColumnGrain * r * groups), [&](int64_t first, int64_t last) {
                         for (int64_t k = first * kColumnGrain; k < std::min(last * kColumnGrain, columns);
                              k += kColumnGrain) {
                             const int64_t begin = k / part * part,
                                           stride = filled_up(std::min(part, columns - begin), kColumnGrain);
                             for (int64_t i = 0; i < r; ++i) {
                                 const float* from = all + width * begin + i * stride + k - begin;
                                 float sum[kColumnGrain] = {};
                                 for (int64_t group = 0; group < groups; ++group, from += width * filled)
                                     for (int64_t j = 0; j < kColumnGrain; ++j) sum[j] += from[j];
                                 for (int64_t j = 0; j < std::min<int64_t>(kColumnGrain, columns - k); ++j)
                                     result[i * out_row + (k + j) * out_column] = sum[j];
                             }
                         }
                     });
}

// [all leading dimensions, last].
Tensor matrix(const Tensor& t) {
    const at::IntArrayRef sizes = t.sizes();
    return t.contiguous().view({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});
}

// A factor in x's dtype, rounded once.
Tensor like(const Tensor& factor, const Tensor& x) { return factor.to(x.scalar_type()).contiguous(); }

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b,
                                       double scale, double dropout_p, const std::optional<Tensor>& seed,
                                       const std::optional<Tensor>& absmax, const std::optional<Tensor>& code,
                                       int64_t blocksize, const std::optional<Tensor>& nested_absmax,
                                       const std::optional<Tensor>& nested_code,
                                       const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const int64_t out_features = b.size(0), r = a.size(0);
    check_linear(x, weight, bias, out_features, quantized, op);
    check_factors(x, a, b, out_features, op);
    const Dropout dropout = dropout_of(dropout_p, seed, op);
    const Tensor flat = matrix(x);
    const Base of{weight, x.size(-1), out_features, quantized, op};
    const Tensor s = at::empty({flat.size(0), r}, x.options());
    const Kernels kernels = choose(kernel_dtype(x.scalar_type(), op));
    Tensor y;
    if (s.numel() != 0) {
        const Kept keep = kept(kernels, dropout, flat);
        const Factor right = arranged(kernels, like(a, x), true);
        down(kernels, down_args(flat, right, factor_of(scale, dropout), keep.mask, s), flat.size(0));
        y = joined(flat, of, bias, s, like(b, x));
    }
    if (!y.defined()) {
        y = base(flat, of, bias);
        if (s.numel() != 0 && y.numel() != 0) {
            up(kernels, y, s, arranged(kernels, like(b, x), true), {});
        }
    }
    return {y.view(with_last(x, out_features)), s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& s, const Tensor& weight, const Tensor& a,
    const Tensor& b, std::array<bool, 3> needs, double scale, double dropout_p,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& absmax, const std::optional<Tensor>& code,
    int64_t blocksize, const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear_backward";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const int64_t out_features = b.size(0), r = a.size(0), columns = x.size(-1);
    check_linear(x, weight, {}, out_features, quantized, op);
    check_factors(x, a, b, out_features, op);
    check_same(grad, x, op, "grad");
    check_same(s, x, op, "s");
    const Dropout dropout = dropout_of(dropout_p, seed, op);
    const Tensor flat = matrix(x), rows = matrix(grad);
    const int64_t count = flat.size(0);
    TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(with_last(x, out_features)), op, ": grad must be ",
                      with_last(x, out_features), ", found ", grad.sizes());
    TORCH_CHECK_VALUE(s.dim() == 2 && s.size(0) == count && s.size(1) == r && s.is_contiguous(), op,
                      ": s must be a contiguous [", count, ", ", r, "], found ", s.sizes());
    const bool nothing = count == 0 || r == 0 || columns == 0 || out_features == 0;
    const auto gradient = [&](bool needed, at::IntArrayRef shape) {
        const Tensor made = at::empty(needed ? shape : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
        return nothing ? made.zero_() : made;
    };
    const Tensor da = gradient(needs[1], a.sizes()), db = gradient(needs[2], b.sizes());
    const Base of{weight, columns, out_features, quantized, op};
    Tensor dx = at::empty({0}, x.options());
    if (nothing) {
        if (needs[0]) dx = base_backward(rows, of);
    } else {
        const Kernels kernels = choose(kernel_dtype(x.scalar_type(), op));
        const Tensor t = at::empty({count, r}, x.options());
        const bool needs_t = needs[0] || needs[1];
        const Factor right = needs_t ? arranged(kernels, like(b, x), false) : Factor{};
        const DownArgs makes_t =
            needs_t ? down_args(rows, right, factor_of(scale, dropout), {}, t) : DownArgs{};
        if (needs[2])
            outer(kernels, rows, s, db, true, {}, needs_t ? &makes_t : nullptr);
        else if (needs_t)
            down(kernels, makes_t, count);
        const Kept keep = needs_t ? kept(kernels, dropout, flat) : Kept{};
        if (needs[1]) outer(kernels, flat, t, da, false, keep.mask, nullptr);
        if (needs[0]) {
            const Tensor factor = like(a, x);
            dx = joined_backward(rows, of, t, factor, keep.mask);
            if (!dx.defined()) {
                dx = base_backward(rows, of);
                up(kernels, dx, t, arranged(kernels, factor, false), keep.mask);
            }
        }
    }
    if (needs[0]) dx = dx.view(x.sizes());
    return {dx, da.to(a.scalar_type()), db.to(b.scalar_type())};
}

// Rows of x that pass through one adapter: below, its factors are read as they lie.
constexpr int64_t kArrangeFrom = 8;
constexpr int64_t kRoom = 16;  // see RowKernels

// The rows [index] of x by adapters whose factors are not arranged; all of one dtype.
void add_rows(const Tensor& x, const Tensor& y, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
              at::ArrayRef<double> scales, const std::vector<std::pair<int64_t, int64_t>>& rows,
              const char* op) {
    const RowKernels of_x = choose_rows(kernel_dtype(x.scalar_type(), op));
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
            choose_rows(kernel_dtype(down.scalar_type(), op))
                .multiply(wide.data(), down.const_data_ptr(), columns, r, s.data());
            for (int64_t j = 0; j < r; ++j) s[size_t(j)] *= float(scales[size_t(which)]);
            choose_rows(kernel_dtype(up.scalar_type(), op))
                .multiply(s.data(), up.const_data_ptr(), r, out_features, delta.data());
            of_x.add(delta.data(), out_features,
                     static_cast<char*>(y.mutable_data_ptr()) + row * out_features * y.element_size());
        }
    });
}

Tensor lora_linear_per_sample(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              at::TensorList a, at::TensorList b, at::ArrayRef<double> scales,
                              const Tensor& index, int64_t out_features, const std::optional<Tensor>& absmax,
                              const std::optional<Tensor>& code, int64_t blocksize,
                              const std::optional<Tensor>& nested_absmax,
                              const std::optional<Tensor>& nested_code,
                              const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear_per_sample";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    check_linear(x, weight, bias, out_features, quantized, op);
    check_adapters(x, a, b, scales, index, out_features, op);
    const Tensor flat = matrix(x);
    const Tensor y = base(flat, {weight, x.size(-1), out_features, quantized, op}, bias);
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
    const Kernels kernels = choose(kernel_dtype(x.scalar_type(), op));
    std::vector<Tensor> few_a(a.size()), few_b(a.size());
    std::vector<std::pair<int64_t, int64_t>> few;
    for (size_t i = 0; i < a.size(); ++i) {
        const int64_t r = a[i].size(0);
        if (total[i] == 0 || r == 0) continue;
        if (total[i] < kArrangeFrom) {
            const bool known = a[i].scalar_type() != at::kDouble && b[i].scalar_type() != at::kDouble;
            few_a[i] = known ? a[i].contiguous() : like(a[i], x);
            few_b[i] = known ? b[i].contiguous() : like(b[i], x);
        }
        Factor down_right, up_right;
        if (total[i] >= kArrangeFrom) {
            down_right = arranged(kernels, like(a[i], x), true);
            up_right = arranged(kernels, like(b[i], x), true);
        }
        for (int64_t sample = 0; sample < samples; ++sample) {
            if (of[sample] != int64_t(i)) continue;
            const int64_t first = sample * count;
            if (total[i] < kArrangeFrom) {
                for (int64_t row = first; row < first + count; ++row) few.emplace_back(row, int64_t(i));
            } else {
                const Tensor s = at::empty({count, r}, x.options());
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

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("lora_linear", &lora_linear);
    m.impl("lora_linear_backward", &lora_linear_backward);
    m.impl("lora_linear_per_sample", &lora_linear_per_sample);
}

}  // namespace lora
}  // namespace peftcore
