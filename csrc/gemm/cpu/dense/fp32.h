// A dense W of any dtype as the right side of a product whose words are fp32.
#pragma once

#include "gemm/cpu/kernels.h"
#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose8.h"

namespace peftcore {
namespace gemm {
namespace {

// 8 rows of W at a time, which become columns of B.
template <typename T>
void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    for (int64_t begin = 0; begin < tiles * kTileColumns; begin += 8) {
        const int64_t row = column + begin;
        if (row >= weight.rows) return;
        const T* from[8];
        for (int r = 0; r < 8; ++r)  // repeats the last row, for columns that are not stored
            from[r] = static_cast<const T*>(weight.dense) + least(row + r, weight.rows - 1) * weight.columns;
        float* to = reinterpret_cast<float*>(out) + begin / kTileColumns * stride + begin % kTileColumns;
        for (int64_t k = first; k < last; k += 8, to += 8 * kTileColumns) {
            const int64_t count = least(8, last - k);
            __m256 block[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r) block[r] = load_some(from[r] + k, count);
            transpose8(block);
            for (int64_t p = 0; p < count; ++p) _mm256_storeu_ps(to + p * kTileColumns, block[p]);
        }
    }
}

template <typename T>
void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    constexpr int64_t kAhead = 16;  // rows
    for (int64_t k = first; k < last; ++k, out += kTileColumns) {
        const T* from = static_cast<const T*>(weight.dense) + k * weight.columns + column;
        for (int i = 0; i < tiles; ++i) {
            float* to = reinterpret_cast<float*>(out) + i * stride;
            const T* values = from + i * kTileColumns;
            const char* ahead = reinterpret_cast<const char*>(values + kAhead * weight.columns);
            _mm_prefetch(ahead, _MM_HINT_T0);
            if constexpr (sizeof(T) == sizeof(float)) _mm_prefetch(ahead + 64, _MM_HINT_T0);
            for (int64_t j = 0; j < kTileColumns; j += 8) {
                const int64_t left = weight.columns - column - i * kTileColumns - j;
                if (left <= 0) break;
                _mm256_storeu_ps(to + j, load_some(values + j, least(8, left)));
            }
        }
    }
}

template <typename T>
DenseReader reader_of() {
    return {{.transposed = {.unpack = unpack_transposed<T>, .region = region_transposed},
             .plain = {.unpack = unpack_plain<T>, .region = region_plain}}};
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore
