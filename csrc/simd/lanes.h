// Vectors of fp32: what a SIMD level must supply (`Lanes`), and loads and stores of partial vectors at the end of a row.
// The loops in simd/loops.h are templates over these, written once for all levels.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>

#include "common/half.h"
#include "common/integers.h"
#include "simd/keep_bytes.h"

namespace peftcore {
namespace simd {

template <typename Simd, typename T>
concept LoadsAndStores = requires(const T* from, T* to, typename Simd::Vector vector) {
    { Simd::load(from) } -> std::same_as<typename Simd::Vector>;
    Simd::store(to, vector);  // rounded to the nearest
};

template <typename Simd>
concept Lanes = LoadsAndStores<Simd, float> && LoadsAndStores<Simd, Half> && LoadsAndStores<Simd, BFloat16> &&
                requires(typename Simd::Vector v, float value, uint32_t bits, const Dropout& dropout,
                         int64_t n, uint8_t* out) {
                    { Simd::kLanes } -> std::convertible_to<int>;  // of a vector of fp32 sums
                    { Simd::kRows } -> std::convertible_to<int>;   // rows that share a right vector
                    { Simd::zero() } -> std::same_as<typename Simd::Vector>;
                    { Simd::set(value) } -> std::same_as<typename Simd::Vector>;
                    { Simd::add(v, v) } -> std::same_as<typename Simd::Vector>;
                    { Simd::mul(v, v) } -> std::same_as<typename Simd::Vector>;
                    { Simd::fma(v, v, v) } -> std::same_as<typename Simd::Vector>;   // a b + c
                    { Simd::keep(v, bits) } -> std::same_as<typename Simd::Vector>;  // 0 where the bit is 0
                    // Takes kLanes vectors, starting at &v; lane i of the result is the sum of v[i]'s lanes.
                    { Simd::sums(&v) } -> std::same_as<typename Simd::Vector>;
                    Simd::keep_bytes(dropout, n, n, n, out);  // row, first, count: see dropout.h
                };

// A level may have `gather`, which writes n <= 16 values that are `stride` apart, and pads with zeros to 16. It returns
// false and writes nothing if it does not support the stride.
template <typename Simd>
concept Gathers = requires(const float* from, int64_t stride, int64_t n, float* out) {
    { Simd::gather(from, stride, n, out) } -> std::same_as<bool>;
};

template <typename Level, typename S>
static inline typename Level::Vector load_some(const S* from, int64_t count) {
    if (__builtin_expect(count >= Level::kLanes, true)) return Level::load(from);
    if (count <= 0) return Level::zero();
    S whole[Level::kLanes] = {};
    std::memcpy(whole, from, size_t(count) * sizeof(S));
    return Level::load(whole);
}

template <typename Level, typename S>
static inline void store_some(S* to, int64_t count, typename Level::Vector value) {
    if (__builtin_expect(count >= Level::kLanes, true)) return Level::store(to, value);
    if (count <= 0) return;
    S whole[Level::kLanes];
    Level::store(whole, value);
    std::memcpy(to, whole, size_t(count) * sizeof(S));
}

// The bits of kLanes columns from `column` on, which is a multiple of kLanes.
template <typename Level>
static inline uint32_t bits_at(const uint8_t* keep, int64_t column) {
    uint32_t bits = 0;
    std::memcpy(&bits, keep + column / 8, Level::kLanes >= 8 ? Level::kLanes / 8 : 1);
    return bits >> column % 8;
}

// A level may transpose as many vectors as it has lanes.
template <typename Level>
concept Transposes = requires(typename Level::Vector (&rows)[Level::kLanes]) { Level::transpose(rows); };

// The vectors of `Simd`, for x of type `Type`.
template <Lanes Simd, typename Type>
struct Of : Simd {
    using T = Type;
};

template <typename Level>
static inline void stage_row(const typename Level::T* row, int64_t columns, const uint8_t* keep, float* out) {
    for (int64_t k = 0; k < columns; k += Level::kLanes) {
        typename Level::Vector value = load_some<Level>(row + k, columns - k);
        if (keep != nullptr) value = Level::keep(value, bits_at<Level>(keep, k));
        Level::store(out + k, value);
    }
}

}  // namespace simd
}  // namespace peftcore
