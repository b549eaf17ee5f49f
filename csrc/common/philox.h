// Philox4x32-10: random bits as a pure function of a key and a counter, the same on every device.
//
// Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
#pragma once

#include "common/half.h"

namespace peftcore {

struct Philox4 {
    uint32_t x[4];
};

static PEFTCORE_HD Philox4 philox(uint64_t key, uint64_t low, uint64_t high) {
    Philox4 c = {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xd2511f53u) * c.x[0], b = uint64_t(0xcd9e8d57u) * c.x[2];
        c = {{uint32_t(b >> 32) ^ c.x[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.x[3] ^ k1, uint32_t(a)}};
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

}  // namespace peftcore
