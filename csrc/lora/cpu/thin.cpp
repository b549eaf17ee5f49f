#include "lora/cpu/thin.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "common/cpu_features.h"
#include "lora/cpu/dropout.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kProductsPerTask = 1 << 17, kCountersPerTask = 1 << 12;

// Sums over the rows of x are made by groups of rows, each in their order, and added in theirs: by the shapes
// alone, whatever the number of threads.
constexpr int64_t kGroupRows = 256;
constexpr int64_t kAllSums = int64_t(1) << 23;  // of all groups: 32 MB; beyond, groups have more rows
constexpr int64_t kOwnSums = int64_t(1) << 17;  // of a task: they stay in the second cache

int64_t filled_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

}  // namespace

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

Tensor matrix(const Tensor& t) {
    const at::IntArrayRef sizes = t.sizes();
    return t.contiguous().view({c10::multiply_integers(sizes.begin(), sizes.end() - 1), sizes.back()});
}

Tensor like(const Tensor& factor, const Tensor& x) { return factor.to(x.scalar_type()).contiguous(); }

}  // namespace lora
}  // namespace peftcore
