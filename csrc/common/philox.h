// Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), shared by host and device:
// a counter and a key give four words, independent of earlier calls. Seven rounds are the fewest that pass
// BigCrush; the authors chose ten.
#pragma once

#include "common/half.h"

namespace peftcore {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiply0 = 0xD2511F53u, kPhiloxMultiply1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxWords {
    uint32_t word[4];
};

template <int kRounds = kPhiloxRounds>
static PEFTCORE_HD PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
    uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t p = uint64_t(a) * kPhiloxMultiply0, q = uint64_t(c) * kPhiloxMultiply1;
        a = uint32_t(q >> 32) ^ b ^ key0;
        b = uint32_t(q);
        c = uint32_t(p >> 32) ^ d ^ key1;
        d = uint32_t(p);
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
    return {{a, b, c, d}};
}

}  // namespace peftcore
