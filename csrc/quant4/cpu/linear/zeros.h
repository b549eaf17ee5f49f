// What zero points add to results (see kernels.h), compiled at each SIMD level by the compiler's vectors.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

// Lanes of a register: g++ 12 keeps wider vectors in memory. With AVX-512 16 lanes are as fast as 8.
#if defined(__AVX2__)
constexpr int kZeroLanes = 8;
#else
constexpr int kZeroLanes = 4;
#endif
constexpr int kSumLanes = 16;         // sums that do not wait for one another
constexpr int kZeroRows = 4;          // of W together
constexpr int64_t kZeroBlocks = 512;  // of a row together

typedef float Lanes __attribute__((vector_size(kZeroLanes * sizeof(float))));
typedef float Lanes4 __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t Integers4 __attribute__((vector_size(4 * sizeof(int32_t))));

inline float sum_of_lanes(float (&lanes)[kSumLanes]) {
#pragma GCC unroll 4
    for (int step = kSumLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

template <typename T>
void sum_blocks_as(const T* x, int64_t blocks, int64_t size, float* out) {
    for (int64_t b = 0; b < blocks; ++b, x += size) {
        float lanes[kSumLanes] = {}, values[kMinBlocksize];
        for (int64_t k = 0; k < size; k += kMinBlocksize) {
            widen(x + k, kMinBlocksize, values);
            for (int i = 0; i < kSumLanes; ++i) lanes[i] += values[i] + values[kSumLanes + i];
        }
        out[b] = sum_of_lanes(lanes);
    }
}

void sum_blocks(const void* x, Dtype dtype, int64_t batch, int64_t columns, int shift, float* out) {
    const int64_t size = int64_t(1) << shift, blocks = columns >> shift, stride = sums_stride(blocks);
    const auto sum_rows = [&](const auto* from) {
        for (int64_t m = 0; m < batch; ++m, from += columns, out += stride) {
            sum_blocks_as(from, blocks, size, out);
            for (int64_t b = blocks; b < stride; ++b) out[b] = 0;
        }
    };
    if (dtype == Dtype::kFloat) return sum_rows(static_cast<const float*>(x));
    if (dtype == Dtype::kHalf) return sum_rows(static_cast<const Half*>(x));
    return sum_rows(static_cast<const BFloat16*>(x));
}

// kZeroLanes scales or zero points as fp32.
template <typename T>
[[gnu::always_inline]] inline Lanes widened(const T* from) {
    float values[kZeroLanes];
    widen(from, kZeroLanes, values);
    Lanes lanes;
    memcpy(&lanes, values, sizeof lanes);
    return lanes;
}
#if defined(__AVX2__)
[[gnu::always_inline]] inline Lanes widened(const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return Lanes(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}
[[gnu::always_inline]] inline Lanes widened(const BFloat16* from) {
    const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Lanes(_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16));
}
#else
[[gnu::always_inline]] inline Lanes widened(const uint8_t* from) {
    return Lanes{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}
#endif

// What a block's sum of x is multiplied by. `out` is not written from `count` on.
template <typename Scale, typename Zero>
inline void zero_factors(const Scale* scales, const Zero* zeros, int64_t count, float* out) {
    const auto write = [&](int64_t b) {
        const Lanes factors = widened(scales + b) * (float(kCentre) - widened(zeros + b));
        memcpy(out + b, &factors, sizeof factors);
    };
    int64_t b = 0;
    for (; b + kZeroLanes <= count; b += kZeroLanes) write(b);
    if (b == count) return;
    if (count >= kZeroLanes) return write(count - kZeroLanes);
    for (; b < count; ++b) out[b] = to_float(scales[b]) * (float(kCentre) - float(zeros[b]));
}

// The lanes of `a`, from 0 on, and of `b`, from 4 on.
template <int... kLane>
[[gnu::always_inline]] inline Lanes4 picked(Lanes4 a, Lanes4 b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, kLane...);
#else
    return __builtin_shuffle(a, b, Integers4{kLane...});
#endif
}

// Sums of every fourth lane.
inline Lanes4 four_sums(const Lanes& lanes) {
    Lanes4 part[kZeroLanes / 4];
    memcpy(part, &lanes, sizeof part);
    return kZeroLanes == 8 ? part[0] + part[kZeroLanes / 4 - 1] : part[0];
}

// The products of kZeroRows rows of factors and a row of sums.
inline Lanes4 dot_rows(const float (*factors)[kZeroBlocks], const float* sums, int64_t count) {
    Lanes total[kZeroRows] = {};
    for (int64_t b = 0; b < count; b += kZeroLanes) {
        Lanes x;
        memcpy(&x, sums + b, sizeof x);
#pragma GCC unroll 4
        for (int r = 0; r < kZeroRows; ++r) {
            Lanes factor;
            memcpy(&factor, factors[r] + b, sizeof factor);
            total[r] += factor * x;
        }
    }
    Lanes4 row[kZeroRows];
#pragma GCC unroll 4
    for (int r = 0; r < kZeroRows; ++r) row[r] = four_sums(total[r]);
    const Lanes4 first = picked<0, 4, 1, 5>(row[0], row[1]) + picked<2, 6, 3, 7>(row[0], row[1]),
                 second = picked<0, 4, 1, 5>(row[2], row[3]) + picked<2, 6, 3, 7>(row[2], row[3]);
    return picked<0, 1, 4, 5>(first, second) + picked<2, 3, 6, 7>(first, second);
}

template <typename Scale, typename Zero>
void addend_as(const WeightView& weight, const Scale* scales, const Zero* zeros, const float* sums,
               int64_t batch, int64_t first, int64_t last, float* out) {
    const int64_t blocks = weight.columns >> weight.shift, stride = sums_stride(blocks);
    alignas(64) float factors[kZeroRows][kZeroBlocks] = {};
    for (int64_t n = first; n < last; n += kZeroRows) {
        const int64_t rows = least(last - n, kZeroRows);
        for (int64_t begin = 0; begin < blocks; begin += kZeroBlocks) {
            const int64_t count = least(blocks - begin, kZeroBlocks);
            if (blocks > kZeroBlocks && count % kZeroLanes != 0) memset(factors, 0, sizeof factors);
            for (int64_t r = 0; r < kZeroRows; ++r) {  // repeats the last row, without storing it
                const int64_t at = least(n + r, last - 1) * blocks + begin;
                zero_factors(scales + at, zeros + at, count, factors[r]);
            }
            for (int64_t m = 0; m < batch; ++m) {
                float* to = out + m * weight.rows + n;
                const Lanes4 found = dot_rows(factors, sums + m * stride + begin, count);
                if (rows < kZeroRows || begin > 0) {
                    for (int64_t r = 0; r < rows; ++r) to[r] = found[r] + (begin == 0 ? 0 : to[r]);
                    continue;
                }
                memcpy(to, &found, sizeof found);
            }
        }
    }
}

void zeros_addend(const WeightView& weight, const float* sums, int64_t batch, int64_t first, int64_t last,
                  float* out) {
    AffineScales(weight).from(0, [&](const auto* scales) {
        if (weight.whole_zeros)
            addend_as(weight, scales, static_cast<const uint8_t*>(weight.zeros), sums, batch, first, last,
                      out);
        else
            addend_as(weight, scales, static_cast<const float*>(weight.zeros), sums, batch, first, last, out);
    });
}

constexpr ZeroPoints kZeroPoints{.sum_blocks = sum_blocks, .addend = zeros_addend};

}  // namespace
}  // namespace quant4
}  // namespace peftcore
