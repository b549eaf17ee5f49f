// Integer arithmetic of sizes, for host and device. `static`, as in half.h: every SIMD level has its own copy.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace peftcore {

struct Range {
    int64_t first, last;
};

static PEFTCORE_HD constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// a / b rounded up, for a >= 0 and b > 0, without a sum that could overflow.
static PEFTCORE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// `count` rounded up to the next multiple.
static PEFTCORE_HD constexpr int64_t filled_up(int64_t count, int64_t multiple) {
    return ceil_div(count, multiple) * multiple;
}

static PEFTCORE_HD constexpr int log2_of(int64_t power_of_two) {
    int exponent = 0;
    while ((int64_t(1) << exponent) < power_of_two) ++exponent;
    return exponent;
}

}  // namespace peftcore
