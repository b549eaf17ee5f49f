// The dropout mask of a row as bits, one byte per counter (see common/dropout.h), in plain C++.
#pragma once

#include "common/dropout.h"

namespace peftcore {
namespace simd {

constexpr int kCounters = 16;  // computed together in a step

// Writes the bytes for columns [8 first, 8 (first + count)) of `row`; `out` has room for `count` rounded up to kCounters.
static inline void plain_keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                    uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        const PhiloxWords words = dropout_words(dropout, row, first + i);
        uint32_t bits = 0;
        for (int j = 0; j < kColumnsPerCounter; ++j) bits |= keeps(words, j, dropout.threshold) << j;
        out[i] = uint8_t(bits);
    }
}

}  // namespace simd
}  // namespace peftcore
