// 256 values of a row of T, in fp32: loops over a row load a chunk, compute, and store it.
#pragma once

#include "simd/lanes.h"

namespace peftcore {
namespace simd {

constexpr int64_t kChunk = 256;  // values: they stay in the L1 cache

template <typename Level>
struct Chunk {
    using T = typename Level::T;
    static constexpr int kLanes = Level::kLanes;
    static_assert(kChunk % kLanes == 0);

    alignas(64) float value[kChunk] = {};

    void load(const T* from, int64_t count) {
        for (int64_t n = 0; n < count; n += kLanes)
            Level::store(value + n, load_some<Level>(from + n, count - n));
    }
    void store(T* to, int64_t count) const {
        for (int64_t n = 0; n < count; n += kLanes)
            store_some<Level>(to + n, count - n, Level::load(value + n));
    }
    // Rounds the values to T.
    void round(int64_t count = kChunk) {
        if constexpr (sizeof(T) < sizeof(float)) {
            alignas(64) T rounded[kLanes];
            for (int64_t n = 0; n < count; n += kLanes) {
                Level::store(rounded, Level::load(value + n));
                Level::store(value + n, Level::load(rounded));
            }
        }
    }
};

}  // namespace simd
}  // namespace peftcore
