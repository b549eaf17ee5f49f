// The dropout mask, shared by host and device. It is never stored: it is a function of the seed, the row and the column.
//
// keep(m, k), for row m of x [M, K] (its leading dimensions flattened) and column k:
//   counter = (k / 8, m low, m high, 0), key = (seed low, seed high): Philox4x32-7 gives four words
//   u       = bits 16 (k % 2) .. + 15 of word (k % 8) / 2
//   keep    = u >= threshold, threshold = round(65536 p) of dropout_p: so p is threshold / 65536
#pragma once

#include "common/philox.h"

namespace peftcore {

struct Dropout {
    uint32_t threshold = 0;  // of 65536; 0 keeps all
    uint32_t key0 = 0, key1 = 0;
    // In device memory, from which kernels read the key; nullptr if key0 and key1 are set.
    const int64_t* seed = nullptr;
};

// Returns the mask with its key, which is read from device memory if the seed is there. A kernel calls this once, first.
static PEFTCORE_HD Dropout with_key(Dropout dropout) {
    if (dropout.seed == nullptr) return dropout;
    const uint64_t key = uint64_t(*dropout.seed);
    dropout.key0 = uint32_t(key);
    dropout.key1 = uint32_t(key >> 32);
    dropout.seed = nullptr;
    return dropout;
}

constexpr int kColumnsPerCounter = 8;

static PEFTCORE_HD PhiloxWords dropout_words(const Dropout& dropout, int64_t row, int64_t columns_over_8) {
    return philox({{uint32_t(columns_over_8), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0u}},
                  dropout.key0, dropout.key1);
}

// 0 or 1 for column 8 * columns_over_8 + within, from the words of its counter.
static PEFTCORE_HD uint32_t keeps(const PhiloxWords& words, int within, uint32_t threshold) {
    return ((words.word[within / 2] >> (16 * (within % 2))) & 0xffffu) >= threshold;
}

}  // namespace peftcore
