// What zero points add to results (see kernels.h), with AVX-512: 16 blocks at a time, 16 rows of W together.
#pragma once

#include "common/avx512.h"
#include "quant4/cpu/linear/kernels.h"
#include "quant4/cpu/linear/scales.h"

namespace peftcore {
namespace quant4 {
namespace {

// Columns [first, last) of rows [0, kBatch) of the addend. `sums` and `out` are those of the first one.
template <int kBatch>
void add_zero_points(const RowScales& scales, const WeightView& weight, const float* sums, int64_t first,
                     int64_t last, float* out) {
    constexpr int kRows = 16, kLanes = 16;
    const int64_t stride = sums_stride(weight.columns >> weight.shift);
    alignas(64) float lanes[kBatch][kRows][kLanes];
    for (int64_t n = first; n < last; n += kRows) {
        const int64_t rows = least(last - n, kRows);
        scales.zero_factors(n, rows, [&](int64_t r, const auto& each) {
            __m512 total[kBatch];
            for (__m512& one : total) one = _mm512_setzero_ps();
            each([&](int64_t b, __m512 factors) {
                for (int i = 0; i < kBatch; ++i)
                    total[i] = _mm512_fmadd_ps(factors, _mm512_loadu_ps(sums + i * stride + b), total[i]);
            });
            for (int i = 0; i < kBatch; ++i) _mm512_store_ps(lanes[i][r], total[i]);
        });
        for (int i = 0; i < kBatch; ++i) {
            const __m512 found = sums_of_lanes([&](int64_t r) { return lanes[i][least(r, rows - 1)]; });
            _mm512_mask_storeu_ps(out + i * weight.rows + n, __mmask16((1u << rows) - 1), found);
        }
    }
}

void zeros_addend_avx512(const WeightView& weight, const float* sums, int64_t batch, int64_t first,
                         int64_t last, float* out) {
    const RowScales scales(weight, kMinBlocksize);
    const int64_t stride = sums_stride(weight.columns >> weight.shift);
    const auto add = [&]<int kBatch>(int64_t m, std::integral_constant<int, kBatch>) {
        add_zero_points<kBatch>(scales, weight, sums + m * stride, first, last, out + m * weight.rows);
    };
    int64_t m = 0;
    for (; m + 4 <= batch; m += 4) add(m, std::integral_constant<int, 4>());
    for (; m + 2 <= batch; m += 2) add(m, std::integral_constant<int, 2>());
    if (m < batch) add(m, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
