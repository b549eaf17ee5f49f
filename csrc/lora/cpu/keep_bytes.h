// The dropout mask of a row as bits, a byte for each counter (see lora/dropout.h), without SIMD.
#pragma once

#include "lora/dropout.h"

namespace peftcore {
namespace lora {

constexpr int kCounters = 16;  // that a step computes together

// Bytes for columns [8 first, 8 (first + count)) of `row`; `out` holds `count` rounded up to
// kCounters.
static inline void plain_keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                    uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        const PhiloxWords words = dropout_words(dropout, row, first + i);
        uint32_t bits = 0;
        for (int j = 0; j < kColumnsPerCounter; ++j) bits |= keeps(words, j, dropout.threshold) << j;
        out[i] = uint8_t(bits);
    }
}

}  // namespace lora
}  // namespace peftcore
