// The dynamic 8-bit map: signed for first moments, unsigned for second ones. Shared by host and device.
//
//   code k in ascending order of value; magnitude n = |k - 127| (signed) or k + 1, 0 for k = 0 (unsigned)
//   decade d: n in [2^(d+s), 2^(d+s+1)), d = 0..6, s = 0 signed, 1 unsigned
//   value: the middle of part n - 2^(d+s) of the 2^(d+s) equal parts of [0.1, 1], times 10^(d-6)
//   and also 0 and 1 (n = 2^(7+s))
//
// Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861, section 2), and
// 8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561). The map has the same bits as bitsandbytes'.
//
// A value is encoded as the nearest code: a comparison finds the decade, a multiplication and an addition in fp32 find
// the part of it. Of two entries that are equally near within the rounding of these, either may be taken. A second moment
// above 0 is never stored as 0, which would make the next update divide by eps.
#pragma once

#include "common/half.h"

namespace peftcore {
namespace optim {

// n = trunc(min(a slope[r] + 8/9, below 2) parts[r]) for a scaled magnitude a in [2^-31, 2). The row r is e,
// half the exponent of a (4 bits: a factor of 4, which no two decades begin within), plus 16 where a >
// threshold[e].
struct Encoder {
    float threshold[16], slope[32], parts[32];
};

struct Map {
    float value[256];
    Encoder encoder;
};

constexpr float kSmallestMagnitude = 4.656612873077393e-10f;  // 2^-31
constexpr float kEightNinths = 0.888888888888888888f;
constexpr float kBelowTwo = 1.99999988079071044921875f;  // the largest float below 2

static PEFTCORE_HD int encode_magnitude(float a, const Encoder& encoder) {
    const float raised = a > kSmallestMagnitude ? a : kSmallestMagnitude;
    const int exponent = int(float_bits(raised) >> 24 & 15);
    const int row = exponent + (raised > encoder.threshold[exponent] ? 16 : 0);
#if defined(__CUDA_ARCH__)
    const float part = __fadd_rn(__fmul_rn(raised, encoder.slope[row]), kEightNinths);
#else
    const float part = raised * encoder.slope[row] + kEightNinths;
#endif
    return int((part < kBelowTwo ? part : kBelowTwo) * encoder.parts[row]);
}

// The code of a value already divided by the largest magnitude of its block.
static PEFTCORE_HD uint8_t encode_signed(float scaled, const Encoder& encoder) {
    const int n = encode_magnitude(scaled < 0 ? -scaled : scaled, encoder);
    return uint8_t(scaled < 0 ? (n > 127 ? 0 : 127 - n) : 127 + n);
}
static PEFTCORE_HD uint8_t encode_unsigned(float scaled, const Encoder& encoder) {
    return scaled > 0 ? uint8_t(encode_magnitude(scaled, encoder) - 1) : 0;
}

// The two maps, built once.
const Map& signed_map();
const Map& unsigned_map();

}  // namespace optim
}  // namespace peftcore
