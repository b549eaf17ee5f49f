// Loads and stores of single values whose dtype is known only at run time, and of vectors of values.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/dtype.h"
#include "common/half.h"

namespace peftcore {

static __device__ __forceinline__ float value_at(const void* from, Dtype dtype, int64_t at) {
    if (dtype == Dtype::kFloat) return static_cast<const float*>(from)[at];
    if (dtype == Dtype::kHalf) return to_float(static_cast<const Half*>(from)[at]);
    return to_float(static_cast<const BFloat16*>(from)[at]);
}

static __device__ __forceinline__ void store_at(void* to, Dtype dtype, int64_t at, float value) {
    if (dtype == Dtype::kFloat)
        static_cast<float*>(to)[at] = value;
    else if (dtype == Dtype::kHalf)
        static_cast<Half*>(to)[at] = from_float<Half>(value);
    else
        static_cast<BFloat16*>(to)[at] = from_float<BFloat16>(value);
}

// Neighbouring values that a thread loads and stores at once, in pieces of up to 16 bytes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
    T item[kCount];
};

template <int kCount, typename T>
static __device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <typename T, int kCount>
static __device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& values) {
    *reinterpret_cast<Vector<T, kCount>*>(to) = values;
}

}  // namespace peftcore
