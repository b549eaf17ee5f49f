// Sixteen fp32 values, in as many vectors as a level needs for them. Operations on them are those of single values, one
// by one and without contractions, so that all levels give the same bits.
#pragma once

#include <cstdint>

#include "common/half.h"

// Arguments are inlined: the calling convention, which depends on the level, is not used.
#pragma GCC diagnostic ignored "-Wpsabi"
#define PEFTCORE_INLINED __attribute__((always_inline)) static inline

namespace peftcore {
namespace lora {

constexpr int64_t kSixteen = 16;
typedef float Sixteen __attribute__((vector_size(64), may_alias));
typedef uint32_t SixteenBits __attribute__((vector_size(64), may_alias));

using peftcore::bits_float;
using peftcore::float_bits;

PEFTCORE_INLINED SixteenBits float_bits(const Sixteen& x) { return (SixteenBits)x; }
PEFTCORE_INLINED Sixteen bits_float(const SixteenBits& bits) { return (Sixteen)bits; }

// `from` is aligned to 64 bytes.
PEFTCORE_INLINED Sixteen& sixteen_at(float* from) { return *reinterpret_cast<Sixteen*>(from); }
PEFTCORE_INLINED const Sixteen& sixteen_at(const float* from) {
    return *reinterpret_cast<const Sixteen*>(from);
}

PEFTCORE_INLINED uint32_t at_most(uint32_t x, uint32_t most) { return x < most ? x : most; }
PEFTCORE_INLINED SixteenBits at_most(const SixteenBits& x, uint32_t most) {
    const SixteenBits limit = SixteenBits{} + most;
    return x < limit ? x : limit;
}

// All bits where x exceeds `limit`, else none.
PEFTCORE_INLINED uint32_t where_above(uint32_t x, uint32_t limit) { return 0u - uint32_t(x > limit); }
PEFTCORE_INLINED SixteenBits where_above(const SixteenBits& x, uint32_t limit) {
    return (SixteenBits)(x > SixteenBits{} + limit);
}

}  // namespace lora
}  // namespace peftcore
