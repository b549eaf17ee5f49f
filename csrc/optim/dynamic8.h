// The dynamic 8-bit map: signed for first moments, unsigned for second ones. Shared by host and device.
//
//   code k in ascending order of value; magnitude n = |k - 127| (signed) or k + 1, 0 for k = 0 (unsigned)
//   decade d: n in [2^(d+s), 2^(d+s+1)), d = 0..6, s = 0 signed, 1 unsigned
//   value: the middle of part n - 2^(d+s) of the 2^(d+s) equal parts of [0.1, 1], times 10^(d-6)
//   besides these 0, and 1 (n = 2^(7+s))
//
// Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861, section 2), and
// 8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561). The values are bitsandbytes'
// bits. A value is encoded to the nearest code: which decade is a
// comparison, which part of it one multiplication and addition in fp32, so that two entries equally near
// within their rounding may both be taken. A second moment above 0 is never stored as 0, which would make the
// next update divide by eps.
#pragma once

#include "common/half.h"

namespace peftcore {
namespace optim {

// n = trunc(min(a slope[d] + shift[d], last[d])) for a scaled magnitude a; d from a's exponent by one
// comparison: base[e] + (a > threshold[e]), where e is the biased exponent modulo 32 (2^-31 <= a < 2).
struct Encoder {
    float threshold[32];
    int32_t base[32];
    float slope[16], shift[16], last[16];
};

struct Map {
    float value[256];
    Encoder encoder;
};

constexpr float kSmallestMagnitude = 4.656612873077393e-10f;  // 2^-31

static PEFTCORE_HD int encode_magnitude(float a, const Encoder& encoder) {
    const float raised = a > kSmallestMagnitude ? a : kSmallestMagnitude;
    const int exponent = int(float_bits(raised) >> 23 & 31);
    const int decade = encoder.base[exponent] + (raised > encoder.threshold[exponent]);
#if defined(__CUDA_ARCH__)
    const float n = __fadd_rn(__fmul_rn(raised, encoder.slope[decade]), encoder.shift[decade]);
#else
    const float n = raised * encoder.slope[decade] + encoder.shift[decade];
#endif
    return int(n < encoder.last[decade] ? n : encoder.last[decade]);
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
