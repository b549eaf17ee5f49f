// Values of any dtype widened to fp32, 8 at a time, and 8 rows of 8 turned into columns, to arrange x and unpack B
// where words are fp32.
#pragma once

#include <cstring>

#include "common/avx2.h"
#include "common/dtype.h"

namespace peftcore {
namespace gemm {
namespace {

template <typename T>
inline __m256 load_some(const T* from, int64_t count) {
    if (count >= 8) return load8(from);
    T whole[8] = {};
    std::memcpy(whole, from, size_t(count) * sizeof(T));
    return load8(whole);
}

// Values [first, first + count) of up to 8, the others zeros.
inline __m256 widen_some(const void* values, Dtype dtype, int64_t first, int64_t count) {
    switch (dtype) {
        case Dtype::kHalf:
            return load_some(static_cast<const Half*>(values) + first, count);
        case Dtype::kBFloat16:
            return load_some(static_cast<const BFloat16*>(values) + first, count);
        default:
            return load_some(static_cast<const float*>(values) + first, count);
    }
}

inline void store_some(float* to, __m256 values, int64_t count) {
    if (count >= 8) return _mm256_storeu_ps(to, values);
    __m128 left = _mm256_castps256_ps128(values);
    if ((count & 4) != 0) {
        _mm_storeu_ps(to, left);
        left = _mm256_extractf128_ps(values, 1);
        to += 4;
    }
    if ((count & 2) != 0) {
        _mm_storel_pi(reinterpret_cast<__m64*>(to), left);
        left = _mm_movehl_ps(left, left);
        to += 2;
    }
    if ((count & 1) != 0) _mm_store_ss(to, left);
}

// Values [first, first + count).
inline void widen_row(const void* values, Dtype dtype, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t count8 = count - i < 8 ? count - i : 8;
        store_some(out + i, widen_some(values, dtype, first + i, count8), count8);
    }
}

inline void transpose8(__m256 (&row)[8]) {
    __m256 pair[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    __m256 four[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        row[i] = _mm256_permute2f128_ps(four[i], four[4 + i], 0x20);
        row[4 + i] = _mm256_permute2f128_ps(four[i], four[4 + i], 0x31);
    }
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore
