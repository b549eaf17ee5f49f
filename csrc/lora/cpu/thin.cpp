#include "lora/cpu/thin.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "common/caches.h"
#include "common/threads.h"
#include "simd/keep_bytes.h"

namespace peftcore {
namespace lora {

using namespace simd;
namespace {

constexpr int64_t kCountersPerTask = 1 << 12;

// Sums over the rows of x are computed for groups of rows and added in order: they depend on shapes only, not on the
// number of threads.
constexpr int64_t kThinGroupRows = 256;
// Sums of all groups: 32 MB; beyond, groups have more rows. Not a cache's size, as it determines how sums are divided.
constexpr int64_t kAllSums = int64_t(1) << 23;

// Sums of a task, which stay in the L2 cache together with the rows that are read. No sum depends on it.
int64_t sums_per_task() { return std::min(caches().second / 2, int64_t(512) << 10) / int64_t(sizeof(float)); }

// The sums of `outer`: groups of rows by parts of columns, each [width][its columns, padded]. No sum depends on the
// division by the number of threads.
struct Division {
    int64_t columns, width, filled, group_rows, groups, group_size, part, parts;

    Division(int64_t rows, int64_t column_count, int64_t padded_width)
        : columns(column_count), width(padded_width), filled(filled_up(columns, kColumnGrain)) {
        const int64_t most = std::max<int64_t>(1, kAllSums / (width * filled));
        group_rows = filled_up(ceil_div(rows, std::min(most, ceil_div(rows, kThinGroupRows))), kRowGrain);
        groups = ceil_div(rows, group_rows);
        group_size = width * filled;
        part = std::min(filled, filled_up(std::max<int64_t>(1, sums_per_task() / width), kColumnGrain));
        const int64_t threads = threads_here();
        if (groups < threads)
            part = std::min(part, filled_up(ceil_div(columns, ceil_div(threads, groups)), kColumnGrain));
        parts = ceil_div(columns, part);
    }

    // The sums of the part that begins at a column.
    int64_t stride(int64_t begin) const { return filled_up(std::min(part, columns - begin), kColumnGrain); }
    int64_t place(int64_t group, int64_t begin) const { return group * group_size + width * begin; }
};

// out = the sum of all groups' sums; element (i, column) at i * out_row + column * out_column.
void add_groups(const Division& division, const float* sums, int64_t r, float* out, int64_t out_row,
                int64_t out_column) {
    const auto columns_from = [&](int64_t column) {
        const int64_t begin = column / division.part * division.part,
                      count = std::min<int64_t>(kColumnGrain, division.columns - column);
        for (int64_t i = 0; i < r; ++i) {
            const float* from = sums + division.place(0, begin) + i * division.stride(begin) + column - begin;
            float sum[kColumnGrain] = {};
            for (int64_t group = 0; group < division.groups; ++group, from += division.group_size)
                for (int64_t j = 0; j < kColumnGrain; ++j) sum[j] += from[j];
            for (int64_t j = 0; j < count; ++j) out[i * out_row + (column + j) * out_column] = sum[j];
        }
    };
    at::parallel_for(0, division.filled / kColumnGrain,
                     ceil_div(kProductsPerTask, kColumnGrain * r * division.groups),
                     [&](int64_t first, int64_t last) {
                         for (; first < last; ++first) columns_from(first * kColumnGrain);
                     });
}

}  // namespace

Factor arranged_factor(const Arrangement& arrangement, const Tensor& from, bool transposed) {
    const int64_t rows = from.size(0), columns = from.size(1);
    const int64_t inner = transposed ? columns : rows, outer = transposed ? rows : columns;
    const int64_t width = filled_up(outer, kWidthMultiple);
    if (arrangement.pair == 1 && !transposed && width == outer) return {from, width};  // in place
    const Tensor memory = at::empty({ceil_div(inner, arrangement.pair) * width * arrangement.unit_size},
                                    from.options().dtype(at::kByte));
    arrangement.arrange(from.const_data_ptr<float>(), transposed ? 1 : columns, transposed ? columns : 1,
                        inner, outer, width, memory.mutable_data_ptr());
    return {memory, width};
}

KeepMask keep_mask(const ThinKernels& kernels, const Dropout& dropout, const Tensor& x, int64_t first_row) {
    if (dropout.threshold == 0 || x.numel() == 0) return {};
    const int64_t rows = x.size(0), counters = ceil_div(x.size(1), kColumnsPerCounter);
    const int64_t stride = filled_up(counters, kCounters);
    KeepMask result{at::empty({rows, stride}, x.options().dtype(at::kByte)), {}};
    uint8_t* bits = result.memory.mutable_data_ptr<uint8_t>();
    at::parallel_for(0, rows, ceil_div(kCountersPerTask, stride), [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m)
            kernels.keep_bytes(dropout, first_row + m, 0, counters, bits + m * stride);
    });
    result.mask = {bits, stride};
    return result;
}

DownArgs down_args(const Tensor& x, const Factor& right, float factor, const Mask& keep, const Tensor& s) {
    return {.x = x.const_data_ptr(),
            .columns = x.size(1),
            .right = right.units(),
            .width = right.width,
            .r = s.size(1),
            .factor = factor,
            .keep = keep,
            .s = s.mutable_data_ptr<float>()};
}

void down(const ThinKernels& kernels, const DownArgs& args, int64_t rows) {
    at::parallel_for(0, rows, ceil_div(kProductsPerTask, std::max<int64_t>(1, args.columns * args.r)),
                     [&](int64_t first, int64_t last) { kernels.down(args, first, last); });
}

void up(const ThinKernels& kernels, const Tensor& y, const Tensor& s, const Factor& right, const Mask& keep) {
    const int64_t r = s.size(1), columns = y.size(1);
    const UpArgs args{.y = y.mutable_data_ptr(),
                      .columns = columns,
                      .left = s.const_data_ptr<float>(),
                      .inner = r,
                      .right = static_cast<const float*>(right.units()),
                      .width = right.width,
                      .keep = keep};
    const int64_t products = std::max<int64_t>(1, columns * r);
    at::parallel_for(0, y.size(0), ceil_div(kProductsPerTask, products),
                     [&](int64_t first, int64_t last) { kernels.up(args, first, last); });
}

void outer(const ThinKernels& kernels, const Tensor& x, const Tensor& left, const Tensor& out,
           bool transposed, const Mask& keep, const DownArgs* down_too) {
    const int64_t rows = x.size(0), columns = x.size(1), r = left.size(1);
    const Factor factor = arranged_factor(kernels.arrangement, left, false);
    const Division division(rows, columns, factor.width);
    if (down_too != nullptr && division.parts > 1) {
        down(kernels, *down_too, rows);
        down_too = nullptr;
    }
    const Tensor memory = at::empty({division.groups * division.group_size}, out.options());
    float* all = memory.mutable_data_ptr<float>();
    const auto task = [&](int64_t group, int64_t begin) {
        const int64_t end = std::min(begin + division.part, columns),
                      stop = std::min((group + 1) * division.group_rows, rows);
        float* sums = all + division.place(group, begin);
        std::fill_n(sums, division.width * division.stride(begin), 0.0f);
        const OuterArgs args{.x = x.const_data_ptr(),
                             .columns = columns,
                             .left = factor.units(),
                             .width = factor.width,
                             .r = r,
                             .keep = keep,
                             .cached = down_too != nullptr,
                             .first_column = begin,
                             .last_column = end,
                             .sums = sums};
        for (int64_t m = group * division.group_rows; m < stop; m += kRowGrain) {
            const int64_t next = std::min(m + kRowGrain, stop);
            if (down_too != nullptr) kernels.down(*down_too, m, next);
            kernels.outer(args, m, next);
        }
    };
    at::parallel_for(0, division.groups * division.parts,
                     ceil_div(kProductsPerTask, division.group_rows * division.part * r),
                     [&](int64_t first, int64_t last) {
                         for (; first < last; ++first)
                             task(first / division.parts, first % division.parts * division.part);
                     });
    add_groups(division, all, r, out.mutable_data_ptr<float>(), transposed ? 1 : columns, transposed ? r : 1);
}

KeepMask thin_backward(const ThinKernels& kernels, const ThinBackward& call) {
    const bool needs_t = call.needs[0] || call.needs[1];
    const Factor right = needs_t ? arranged_factor(kernels.arrangement, floats(call.b), false) : Factor{};
    const DownArgs makes_t =
        needs_t ? down_args(call.dy, right, dropout_factor(call.scale, call.dropout), {}, call.t)
                : DownArgs{};
    if (call.needs[2])
        outer(kernels, call.dy, call.s.contiguous(), call.db, true, {}, needs_t ? &makes_t : nullptr);
    else if (needs_t)
        down(kernels, makes_t, call.dy.size(0));
    const KeepMask keep = needs_t ? keep_mask(kernels, call.dropout, call.x, call.first_row) : KeepMask{};
    if (call.needs[1]) outer(kernels, call.x, call.t, call.da, false, keep.mask, nullptr);
    return keep;
}

}  // namespace lora
}  // namespace peftcore
