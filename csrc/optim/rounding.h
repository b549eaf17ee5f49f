// Stochastic rounding to 16 bits with a counter-based generator: the same bits on every device.
#pragma once

#include "common/half.h"
#include "common/philox.h"

namespace peftcore {
namespace optim {

// The value rounded to 16 bits, up with the probability of the fraction that is cut off, by 16 random bits. NaN and
// infinity are kept. A value beyond the largest finite one becomes that or infinity, as drawn.
static PEFTCORE_HD BFloat16 round_stochastic(float value, uint32_t random, BFloat16*) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return from_float<BFloat16>(value);
    return {uint16_t((bits + (random & 0xffffu)) >> 16)};
}

static PEFTCORE_HD Half round_stochastic(float value, uint32_t random, Half*) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return from_float<Half>(value);
    if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
    if (magnitude >= 0x38800000u)
        return {uint16_t(sign | (magnitude - 0x38000000u + ((random & 0xffffu) >> 3)) >> 13)};
    // Below 2^-14 the grid is 2^-24: the value as a multiple of 2^-40, 16 of whose bits are cut off.
    const uint32_t fixed = uint32_t(bits_float(magnitude) * 1099511627776.0f);
    return {uint16_t(sign | (fixed + (random & 0xffffu)) >> 16)};
}

// The random bits of eight elements, number `group` of a tensor, for rounding it in a step.
static PEFTCORE_HD PhiloxWords rounding_words(int64_t stream, int64_t group, int64_t step) {
    const PhiloxWords counter = {
        {uint32_t(group), uint32_t(uint64_t(group) >> 32), uint32_t(step), uint32_t(uint64_t(step) >> 32)}};
    return philox<10>(counter, uint32_t(stream), uint32_t(uint64_t(stream) >> 32));
}

// The 16 bits of element `index`, selected by conditions: an index would put the words into memory on a GPU.
static PEFTCORE_HD uint32_t random_bits(const PhiloxWords& drawn, int64_t index) {
    const uint32_t first = index & 2 ? drawn.word[1] : drawn.word[0];
    const uint32_t second = index & 2 ? drawn.word[3] : drawn.word[2];
    return (index & 4 ? second : first) >> (index & 1) * 16;
}

}  // namespace optim
}  // namespace peftcore
