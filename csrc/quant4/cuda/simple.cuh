// A row of y = x Wᵀ + b + s Fᵀ for up to kSimpleTile rows of x, by a warp, for any dtype, shape and alignment.
//
// The lanes load neighbouring words of codes, the next words while they multiply the current ones, and exchange them by
// shuffles, so that their loads of x are contiguous, too: kVector values a lane at a time. A row of W that begins within
// a word, or ends within one, shares that word with its neighbour; only words that the codes do not fill are loaded byte
// by byte.
#pragma once

#include "quant4/cuda/linear.cuh"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kSimpleTile = 8;          // rows of x that a warp takes together
constexpr int kWordCodes = 8;           // codes in a word of 32 bits
constexpr int kStep = 32 * kWordCodes;  // columns that a warp takes at a time
constexpr unsigned kAllLanes = 0xffffffffu;

// Whether kVector values of x and their codes are one load and part of one word.
inline bool in_vectors(const void* x, int vector_bytes, int vector, const WeightView& weight) {
    return weight.columns % vector == 0 && is_aligned(x, vector_bytes) &&
           is_aligned(weight.codes, vector / 2);
}

// The word of codes at a 4-byte boundary; zeros for bytes outside [begin, end).
__device__ __forceinline__ uint32_t word_of_codes(const uint8_t* word, const uint8_t* begin,
                                                  const uint8_t* end) {
    if (word >= begin && end - word >= 4) return *reinterpret_cast<const uint32_t*>(word);
    uint32_t value = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (word + i >= begin && word + i < end) value |= uint32_t(word[i]) << 8 * i;
    return value;
}

template <typename T, int kVector>
__device__ __forceinline__ void load_x(const T* from, float (&values)[kVector]) {
    struct alignas(kVector * sizeof(T)) Vector {
        T items[kVector];
    };
    const Vector loaded = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(loaded.items[i]);
}

// Row `n` of W, rows of x from `first` on.
template <typename T, int kVector>
__device__ __forceinline__ void simple_row(const LinearLaunch& p, const float* quant_map,
                                           const AnyScales<true>& scales, int64_t n, int first) {
    static_assert(kWordCodes % kVector == 0, "a vector's codes are in one word");
    constexpr int kParts = kWordCodes / kVector;  // of a step
    const int lane = threadIdx.x % 32;
    const int64_t columns = p.weight.columns, row = n * columns;  // the row's first element
    const uint8_t *codes = p.weight.codes, *end = codes + ceil_div(p.weight.numel(), 2);
    const uint8_t *begin_of_row = codes + row / 2, *end_of_row = codes + ceil_div(row + columns, 2);
    const int bytes_before = int(reinterpret_cast<uintptr_t>(begin_of_row) % 4);
    const int before =
        2 * bytes_before + int(row % 2);  // codes in the row's first word that are not the row's
    const uint8_t* words = begin_of_row - bytes_before;
    const auto word_at = [&](int64_t step) {
        const uint8_t* word = words + step * (kStep / 2) + lane * 4;
        return word < end_of_row ? word_of_codes(word, codes, end) : 0u;
    };
    const T* x = static_cast<const T*>(p.x) + first * columns;

    float sum[kSimpleTile] = {};
    uint32_t ahead = word_at(0);
    const int64_t steps = ceil_div(before + columns, kStep);
    for (int64_t step = 0; step < steps; ++step) {
        const uint32_t mine = ahead;
        if (step + 1 < steps) ahead = word_at(step + 1);
#pragma unroll(kParts < 4 ? kParts : 4)
        for (int part = 0; part < kParts; ++part) {
            const int code = lane * kVector;  // of this part
            const uint32_t word = __shfl_sync(kAllLanes, mine, part * 4 * kVector + code / kWordCodes);
            const int64_t k = step * kStep + part * 32 * kVector + code - before;
            if (k < 0 || k >= columns) continue;
            const ScaleAndZero scale =
                scales.of(p.weight, scales.stored(p.weight, (row + k) >> p.weight.shift));
            float w[kVector], values[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i)  // the even code is in the high half of a byte
                w[i] = to_float(
                    from_float<T>(scale.value(quant_map[word >> 4 * ((code % kWordCodes + i) ^ 1) & 15])));
#pragma unroll
            for (int m = 0; m < kSimpleTile; ++m) {
                if (first + m >= p.batch) break;
                load_x(x + m * columns + k, values);
#pragma unroll
                for (int i = 0; i < kVector; ++i) sum[m] += w[i] * values[i];
            }
        }
    }
    for (int j = lane; j < p.rank; j += 32) {
        const float f = factor_value(p, n, j);
#pragma unroll
        for (int m = 0; m < kSimpleTile; ++m) sum[m] += f * thin_value(p, first + m, j);
    }
#pragma unroll
    for (int m = 0; m < kSimpleTile; ++m) {
        for (int distance = 16; distance > 0; distance /= 2)
            sum[m] += __shfl_xor_sync(kAllLanes, sum[m], distance);
        if (lane == 0 && first + m < p.batch) store_result<T>(p, first + m, n, sum[m]);
    }
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore
