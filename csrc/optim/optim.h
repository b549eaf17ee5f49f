// What an optimizer step is made of, shared by host and device.
//
// A rule updates one parameter p from its gradient g and its state, element by element in fp32; every
// multiplication, addition, division and square root is rounded once, `fma` is one rounding. State lies in
// planes: one value an element, or one a block of 256.
//
//   AdamW        m = fma(w1, g - m, m)          w1 < 1/2; else fma(w1 - 1, g - m, g)
//     m, v       v = fma(w2 g, g, v beta2)
//     in fp32    p = p decay + step m / (sqrt(v) / root + eps)
//
//   AdamW 8-bit  m, v as above, of the decoded state
//     m, v as    p = p decay + step m / (sqrt(v) + eps)          step and eps times root
//     codes of dynamic8.h, and the absmax of each block of both
//
//   Lion         p = p decay + step sign(fma(w1, g - m, m))
//     m in fp32  m = fma(w2, g - m, m)
//
//   Momentum     b = momentum b + w g'                           g' = g + wd p
//     b in fp32  p = p + step b                                  Nesterov: p + step (g' + momentum b)
//
// g is the gradient times `factor` (1 / loss scale, its sign turned to maximise).
#pragma once

#include "common/dtype.h"
#include "common/half.h"
#include "common/philox.h"

namespace peftcore {
namespace optim {

using peftcore::Dtype;  // for the launchers, which stand outside

constexpr int kBlock = 256;  // elements; state of a parameter begins at one
constexpr int kMaxPlanes = 4;
constexpr int kScalars = 8;

enum class Rule { kAdamW = 0, kAdamW8bit = 1, kLion = 2, kMomentum = 3 };

// The planes of each rule, in bytes a block of 256 elements.
struct Planes {
    int count;
    int bytes[kMaxPlanes];
    int total() const { return bytes[0] + bytes[1] + bytes[2] + bytes[3]; }
};

static inline Planes planes_of(Rule rule) {
    switch (rule) {
        case Rule::kAdamW:
            return {2, {4 * kBlock, 4 * kBlock}};
        case Rule::kAdamW8bit:
            return {4, {kBlock, kBlock, 4, 4}};
        default:
            return {1, {4 * kBlock}};
    }
}

struct AdamW {
    float factor, decay, weight1, beta2, weight2, step, root, eps;
};
struct Lion {
    float factor, decay, weight1, weight2, step;
};
struct Momentum {
    float factor, weight_decay, momentum, weight, step, nesterov;
};

// The scalars of one update; which of them is read depends on the rule.
union Scalars {
    float value[kScalars];
    AdamW adamw;
    Lion lion;
    Momentum momentum;
};

// A run of elements of one parameter whose state lies together.
struct Segment {
    void* param;
    const void* grad;
    void* state[kMaxPlanes];  // at the first element
    int64_t count;
    int64_t first;   // its first element's place in the parameter, a multiple of 256
    int64_t stream;  // key of the random bits; negative: round to nearest
    int64_t step;    // their counter
    int32_t row;     // of the scalars
    Dtype param_dtype, grad_dtype;
};

// A 16-bit value rounded up or down at random, up with the probability of the fraction cut off, from 16
// random bits. Not finite: as it is. Beyond the largest finite value it is the largest or infinity, as drawn.
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

// Element `index`'s 16 of them. By conditions: an index would put the words into memory on a GPU.
static PEFTCORE_HD uint32_t random_bits(const PhiloxWords& drawn, int64_t index) {
    const uint32_t first = index & 2 ? drawn.word[1] : drawn.word[0];
    const uint32_t second = index & 2 ? drawn.word[3] : drawn.word[2];
    return (index & 4 ? second : first) >> (index & 1) * 16;
}

}  // namespace optim
}  // namespace peftcore
